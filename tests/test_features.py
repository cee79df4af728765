"What real loaders do to features: order, names of classes, ranges, numbers that are none"
import random, types
from contextlib import nullcontext

import numpy as np, pytest, torch, torch.utils.data as td
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.load import DataLoader
from fastai.data.transforms import Categorize, Normalize, parent_label
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from fastai.torch_core import TensorImage
from PIL import Image
from torch import nn
from torch._subclasses import FakeTensorMode
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from self_supervised import features
from self_supervised.data import image_dls, tensor_dls
from self_supervised.dist import rank
from self_supervised.encoders import encoder_dim
from self_supervised.evaluation import OnlineKNN, OnlineProbe, evaluate, extract_features, fine_tune, knn, linear_probe, sgd_probe
from self_supervised.features import class_names, first_batch, image_ids, in_order, n_items
from self_supervised.probes import dataset_labels, ready_labels, renumber

from methods import learner, model, quiet
from processes import on_ranks

class Mean(nn.Module):
    "Mean colour"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(1))
    def forward(self, x): return self.w*x.mean((2,3))


# Order

n = 21
y = torch.arange(n)%3
x = torch.stack([torch.arange(n)/n, .3+.7*(y==1), .3+.7*(y==2)], 1)[:,:,None,None].expand(n,3,4,4).clone() # image i has i/n of red, and the colour of its class
ds = td.TensorDataset(x, y)
w = torch.where(y==1, 9., 1.)

class Forever(td.Sampler):
    "What loops over steps instead of epochs use"
    def __init__(self, n): self.n = n
    def __iter__(self):
        while True: yield from torch.randperm(self.n).tolist()

class Balanced(td.Sampler):
    "Batches with as many of each class"
    def __init__(self, y, each, batches): self.y,self.each,self.batches = y,each,batches
    def __len__(self): return self.batches
    def __iter__(self):
        for _ in range(self.batches): yield [i for c in self.y.unique() for i in random.choices((self.y==c).nonzero().flatten().tolist(), k=self.each)]

class Fold(td.Sampler):
    "A part of one's own making, shuffled by a generator of its own"
    def __init__(self, which): self.which,self.generator = which,torch.Generator().manual_seed(0)
    def __len__(self): return len(self.which)
    def __iter__(self): return (self.which[i] for i in torch.randperm(len(self.which), generator=self.generator))

class Last(TfmdDL):
    "A part, chosen as fastai's loaders do it"
    def get_idxs(self): return list(np.random.permutation([20,18,19]))

class ByNumber(td.Dataset):
    "Makes its batches itself"
    def __len__(self): return n
    def __getitem__(self, i): return ds[torch.tensor(i)]

items = list(zip(x, y))
whole = dict(
    shuffle=lambda: td.DataLoader(ds, 8, shuffle=True), drop_last=lambda: td.DataLoader(ds, 8, drop_last=True), few=lambda: td.DataLoader(ds, 50, drop_last=True),
    weighted=lambda: td.DataLoader(ds, 8, sampler=td.WeightedRandomSampler(w, n)), a_few_weighted=lambda: td.DataLoader(ds, 8, sampler=td.WeightedRandomSampler(w, 5)),
    some=lambda: td.DataLoader(ds, 8, sampler=td.RandomSampler(ds, num_samples=5)), often=lambda: td.DataLoader(ds, 8, sampler=td.RandomSampler(ds, replacement=True, num_samples=99)),
    batch_sampler=lambda: td.DataLoader(ds, batch_sampler=td.BatchSampler(td.RandomSampler(ds), 8, True)), forever=lambda: td.DataLoader(ds, 8, sampler=Forever(n)),
    balanced=lambda: td.DataLoader(ds, batch_sampler=Balanced(y, 2, 3)), batches=lambda: td.DataLoader(ds, batch_sampler=[[20,3],[4,5]]+[[i] for i in range(20) if i not in (3,4,5)]),
    a_rank=lambda: td.DataLoader(ds, 8, sampler=td.DistributedSampler(ds, 2, 1)), by_number=lambda: td.DataLoader(ByNumber(), batch_size=None, sampler=td.BatchSampler(td.RandomSampler(ds), 8, True)),
    one_by_one=lambda: td.DataLoader([(a[None],b[None]) for a,b in items], batch_size=None, shuffle=True), concat=lambda: td.DataLoader(td.ConcatDataset([td.Subset(ds, range(5)), td.Subset(ds, range(5,n))]), 4, shuffle=True),
    WeightedDL=lambda: WeightedDL(items, bs=8, shuffle=True, wgts=w.numpy(), num_workers=0), PartialDL=lambda: PartialDL(items, bs=8, shuffle=True, partial_n=5, num_workers=0),
    shuffle_fn=lambda: TfmdDL(items, bs=8, shuffle=True, num_workers=0, shuffle_fn=lambda ids: ids[::-1]), get_idxs=lambda: TfmdDL(items, bs=8, num_workers=0, get_idxs=lambda: random.sample(range(n), 5)),
    plain_fastai=lambda: DataLoader(items, bs=8, shuffle=True, drop_last=True), fastai_n=lambda: TfmdDL(items, bs=8, n=5, shuffle=True, num_workers=0),
    one_of_two_ranks=lambda: DistributedDL(TfmdDL(items, bs=8, shuffle=True, num_workers=0), rank=1, world_size=2))

@pytest.mark.parametrize('nm', whole)
def test_all_in_order(nm):
    "Samplers that draw for training: every image once, in the order of the dataset, and no trace in any generator"
    dl = whole[nm]()
    states = lambda: (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), getattr(getattr(dl, 'rng', None), 'getstate', int)())
    before = states()
    feats,labels = extract_features(Mean(), dl)
    assert (feats[:,0]*n).round().int().tolist()==list(range(n)) and torch.equal(labels, y) and states()==before
    assert n_items(dl) in (n, 0 if nm=='one_by_one' else n) and torch.equal(first_batch(dl)[1], y[:len(first_batch(dl)[1])])

part = [2,3,5,7,11]
parts = dict(
    SubsetRandomSampler=lambda: td.DataLoader(ds, 2, sampler=td.SubsetRandomSampler(part[::-1])), tensor=lambda: td.DataLoader(ds, 2, sampler=td.SubsetRandomSampler(torch.tensor(part))),
    repeated=lambda: td.DataLoader(ds, 2, sampler=td.SubsetRandomSampler(part*9)), drop_last=lambda: td.DataLoader(ds, batch_sampler=td.BatchSampler(td.SubsetRandomSampler(part), 2, True)),
    own=lambda: td.DataLoader(ds, 2, sampler=Fold(part)), list=lambda: td.DataLoader(ds, 2, sampler=part[::-1]), batches=lambda: td.DataLoader(ds, batch_sampler=[part[3:],part[:3]]),
    Subset=lambda: td.DataLoader(td.Subset(ds, part), 2, shuffle=True), get_idxs=lambda: TfmdDL(items, bs=2, num_workers=0, get_idxs=lambda: random.sample(part, 5)))

@pytest.mark.parametrize('nm', parts)
def test_a_part_stays_a_part(nm):
    "A fold that is held out is not mixed with the rest; it comes in the order of the dataset"
    dl = parts[nm]()
    state = dl.sampler.generator.get_state() if nm=='own' else None
    feats,labels = extract_features(Mean(), dl)
    assert (feats[:,0]*n).round().int().tolist()==part and torch.equal(labels, y[part]) and n_items(dl)==5
    assert state is None or torch.equal(state, dl.sampler.generator.get_state())

def test_fastai_part_in_the_protocols():
    "Draws by number keep to the part too"
    dls = DataLoaders(Last(items, bs=2, num_workers=0), Last(items, bs=2, num_workers=0))
    assert list(image_ids(dls.train))==[18,19,20] and dataset_labels(dls.train).tolist()==[0,1,2]
    for f in (sgd_probe, fine_tune):
        r = f(Mean(), dls, epochs=1, bs=4, **({} if f is sgd_probe else dict(n_per_class=1)))
        assert r.settings['train']==r.settings['test']==3

def init(i): torch.manual_seed(i)
def collate(b): return torch.stack([o[0] for o in b]),torch.stack([o[1] for o in b])

def test_everything_else_is_kept():
    kw = dict(num_workers=1, collate_fn=collate, pin_memory=False, timeout=7, worker_init_fn=init, multiprocessing_context='fork', prefetch_factor=3)
    for how in (dict(shuffle=True), dict(drop_last=True), dict(sampler=td.WeightedRandomSampler(w, 9)), dict(in_order=False)):
        with in_order(td.DataLoader(ds, 5, **how, **kw)) as dl:
            assert dl.batch_size==5 and not dl.drop_last and dl.in_order and isinstance(dl.sampler, td.SequentialSampler)
            assert [dl.num_workers, dl.collate_fn, dl.timeout, dl.worker_init_fn, dl.multiprocessing_context.get_start_method(), dl.prefetch_factor]==[1, collate, 7, init, 'fork', 3]
    with in_order(td.DataLoader(ds, batch_sampler=td.BatchSampler(td.RandomSampler(ds), 6, True), pin_memory=True)) as dl: assert dl.batch_size==6 and dl.pin_memory
    with in_order(td.DataLoader(ds, batch_sampler=Balanced(y, 2, 3))) as dl: assert dl.batch_size==64
    plain = td.DataLoader(ds, 5)
    with in_order(plain) as dl: assert dl is plain # of whatever class it is

def test_streams_come_as_they_are():
    class Stream(td.IterableDataset):
        def __iter__(self): return iter(items[::-1])
    for dl in (td.DataLoader(Stream(), 4), DataLoader(Stream(), bs=4), [(x.flip(0),y.flip(0))], ((a[None],b[None]) for a,b in items[::-1])):
        feats,labels = extract_features(Mean(), dl)
        assert (feats[:,0]*n).round().int().tolist()==list(range(n))[::-1] and torch.equal(labels, y.flip(0))
    assert knn(Mean(), (td.DataLoader(Stream(), 4),)*2, k=1).accuracy==1.
    with pytest.raises(TypeError, match='images are drawn by number'): sgd_probe(Mean(), (td.DataLoader(Stream(), 4),)*2)

def test_names_of_files_are_no_labels():
    names = [f'{i}.png' for i in range(n)]
    for b,want in (((x,names), None), ((x,y,names), y), ((x,names,y), y)):
        for dl in ([b], td.DataLoader(list(zip(*b)), 4, shuffle=True)):
            labels = extract_features(Mean(), dl)[1]
            assert labels is None if want is None else torch.equal(labels, want)
    dls = Datasets(range(n), [[lambda i: x[i]], [lambda i: names[i]], [lambda i: y[i]]], splits=[range(n),range(n)]).dataloaders(bs=4, num_workers=0)
    assert torch.equal(extract_features(Mean(), dls.train)[1], y) and torch.equal(ready_labels(dls.train), y)
    assert sgd_probe(Mean(), dls, epochs=1).settings['test']==n

def test_rows_and_labels_that_do_not_match():
    class Two(nn.Module):
        def forward(self, x): return x.flatten(1).repeat(2, 1)
    with pytest.raises(ValueError, match=r'gives \(6, 48\) for 3 images'): extract_features(Two(), [x[:3]])
    with pytest.raises(ValueError, match='6 images and 3 labels'): extract_features(Mean(), [(x[:3],y[:3]), (x[3:6],)])
    with pytest.raises(ValueError, match='what is an image there'): extract_features(Mean(), [dict(picture=x)])

def test_labels_that_the_dataset_changes():
    "Where a dataset has a transform of its labels, those that lie ready are others than those that are given"
    class Data(td.Dataset):
        targets,target_transform = y,staticmethod(lambda o: 2-o)
        def __len__(self): return n
        def __getitem__(self, i): return x[i],self.target_transform(self.targets[i])
    dl = DataLoader(Data(), bs=4, shuffle=True)
    assert ready_labels(dl) is None and dataset_labels(dl).tolist()==(2-y).tolist() and class_names(dl) is None


# Names of classes

colors = dict(a=(255,0,0), b=(0,255,0), c=(0,0,255), d=(255,255,0))

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "train has a, b, c; val a, c; more b, d; plain numbers in other folders"
    path = tmp_path_factory.mktemp('classes')
    for split,cls in dict(train='abc', val='ac', more='bd').items():
        for c in cls:
            (path/split/c).mkdir(parents=True)
            for i in range(4): Image.new('RGB', (8,8), colors[c]).save(path/split/c/f'{i}.png')
    return path

def fastai(p): return image_dls(p, label_func=parent_label, size=8, bs=4, num_workers=0).train
def torchvision(p): return td.DataLoader(ImageFolder(p, ToTensor()), 5, shuffle=True)
def subset(p): f = ImageFolder(p, ToTensor()); return td.DataLoader(td.Subset(td.Subset(f, range(len(f))), range(len(f))[::-1]), 5)
def concat(p): f = ImageFolder(p, ToTensor()); return td.DataLoader(td.ConcatDataset([f, td.Subset(f, [0])]), 5)
def fastai_over_torchvision(p): return DataLoader(ImageFolder(p, ToTensor()), bs=4)
def with_na(p):
    fns = sorted(p.glob('*/*.png'))
    return Datasets(fns, [[lambda f: torch.tensor(np.array(Image.open(f))).permute(2,0,1)], [parent_label, Categorize(add_na=True)]]).dataloaders(bs=4, num_workers=0).train
loaders = [fastai, torchvision, subset, concat, fastai_over_torchvision, with_na]

@pytest.mark.parametrize('train', loaders)
@pytest.mark.parametrize('test', loaders)
def test_classes_by_name(train, test, folders):
    "Colour tells the classes apart; numbers alone would call every image of c wrong, and with #na# all"
    dls = train(folders/'train'),test(folders/'val')
    assert knn(Mean(), dls, k=3).accuracy==linear_probe(Mean(), dls).accuracy==1.
    with pytest.raises(ValueError, match='dls.valid has classes that dls.train has not: d'): knn(Mean(), (dls[0],test(folders/'more')), k=3)

def test_classes_by_name_everywhere(folders):
    dls,bad = DataLoaders(fastai(folders/'train'), fastai(folders/'val')),DataLoaders(fastai(folders/'train'), fastai(folders/'more'))
    assert [o.accuracy for o in evaluate(Mean(), dls, k=3, n_per_class=2, seeds=2)]==[1.,1.,1.]
    kw = dict(epochs=20, lr=5., bs=4)
    assert sgd_probe(Mean(), dls, **kw).accuracy==1. and fine_tune(Mean(), dls, n_per_class=3, **kw | dict(lr=.01, lr_head=5.)).accuracy==1.
    for f in (lambda: evaluate(Mean(), bad), lambda: sgd_probe(Mean(), bad), lambda: fine_tune(Mean(), bad, n_per_class=1)):
        with pytest.raises(ValueError, match='has not: d'): f()

@pytest.mark.filterwarnings('ignore:the images have 8×8 pixels')
def test_online_classes_by_name(folders):
    "And what cannot be compared is said before the first step, though the first batch would do"
    def fit(dls):
        enc = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        learn = learner('simclr', tensor_dls(torch.rand(8,3,8,8), bs=4), model('simclr', enc=enc), cbs=[OnlineKNN(dls, k=3), OnlineProbe(dls)])
        quiet(learn, 1, 1e-9)
        return learn.recorder.values[-1][-2:]
    assert fit((fastai(folders/'train'),torchvision(folders/'val')))==[1.,1.]
    with pytest.raises(ValueError, match='has not: d'): fit((fastai(folders/'train'),fastai(folders/'more')))

def test_numbers_where_names_are_not_known():
    a,b = tensor_dls((x,y), bs=4).train,td.DataLoader(ds, 4)
    assert class_names(a)==['0','1','2'] and class_names(b) is None
    assert knn(Mean(), (a,b), k=1).accuracy==knn(Mean(), (b,a), k=1).accuracy==1.
    few = tensor_dls((x[y<2],y[y<2]), bs=4).train # digits are names as well: class 2 is new
    with pytest.raises(ValueError, match='has not: 2'): knn(Mean(), (few,a), k=1)
    assert knn(Mean(), (a,few), k=1).accuracy==1.
    one,two = ([type('', (td.Dataset,), dict(classes=c, __len__=lambda s: 1, __getitem__=lambda s,i: items[0]))() for c in o] for o in (['ab','ab'], ['ab','ac']))
    for o in one+two: o.classes = list(o.classes)
    assert class_names(td.DataLoader(td.ConcatDataset(one)))==['a','b']
    with pytest.raises(ValueError, match='number their classes differently'): class_names(td.DataLoader(td.ConcatDataset(two)))
    with pytest.raises(ValueError, match='two classes have one name.*crane'): renumber(y, ['crane','crane','x','y'], ['crane','x','y'])
    with pytest.raises(ValueError, match='a label 2, but names of 2 classes'): renumber(y, ['b','a'], ['a','b'])


# Ranges

def test_ranges():
    "Where we normalise, the images must be what views are made of; a loader that normalises by itself is left alone"
    stats,rand = ([.5]*3,[.25]*3),torch.rand(6,3,8,8)
    for bad,msg in ((rand*255, 'divide them by 255'), (rand*10_000, '10000'), ((rand-.5)*4, 'leave Normalize out')):
        with pytest.raises(ValueError, match=msg): extract_features(Mean(), [bad], stats)
        with pytest.raises(ValueError, match=msg): sgd_probe(Mean(), tensor_dls((bad,y[:6]), (bad,y[:6]), bs=2), stats=stats)
        extract_features(Mean(), [bad])
    want = extract_features(Mean(), [rand.half().float()], stats)[0]
    torch.testing.assert_close(extract_features(Mean(), [rand.half()], stats)[0], want)
    assert torch.equal(extract_features(Mean(), [rand>.5], stats)[0], extract_features(Mean(), [(rand>.5).float()], stats)[0])
    for bad,msg in (((rand*4095).short(), r'x.float\(\)/4095'), (rand.permute(0,2,3,1).contiguous(), 'permute')): # with statistics or not
        for o in (stats, None):
            with pytest.raises(ValueError, match=msg): extract_features(Mean(), [bad], o)
    norm = Normalize.from_stats([.5]*3, [.25]*3, cuda=False)
    own  = TfmdDL(list(zip(map(TensorImage, rand), y)), bs=2, after_batch=[norm], num_workers=0)
    for o in (None, stats): torch.testing.assert_close(extract_features(Mean(), own, o)[0], ((rand-.5)/.25).mean((2,3)))
    sgd_probe(Mean(), DataLoaders(own, own), epochs=1, stats=stats)

def test_range_of_a_learner():
    "Of a Learner with a method the range in training is known, without statistics too; OnlineKNN says so before the first step"
    learn = learner('simclr', tensor_dls(torch.rand(8,3,8,8), bs=4), model('simclr', enc=nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())))
    with pytest.raises(ValueError, match='divide them by 255'): extract_features(learn, [255*torch.rand(4,3,8,8)])
    assert extract_features(Learner(learn.dls, Mean()), [255*torch.rand(4,3,8,8)])[0].shape==(4,3)
    bad = tensor_dls((255*x,y), (255*x,y), bs=4)
    with pytest.raises(ValueError, match='divide them by 255'): quiet(learn, 1, cbs=OnlineKNN(bad, k=1))

def test_bytes_and_floats_are_the_same():
    "A loader that turns bytes into floats gives the features of the bytes, to the bit"
    im = torch.randint(0, 256, (9,3,8,8), dtype=torch.uint8)
    for stats in (None, ([.4]*3,[.2]*3)):
        a,b = (extract_features(Mean(), o, stats)[0] for o in (tensor_dls(im, bs=4).train, [im]))
        assert torch.equal(a, b)


# Numbers that are none

@pytest.mark.parametrize('v', [float('nan'), float('inf')])
def test_no_numbers(v):
    m = Mean(); m.w.data.fill_(v)
    dls = tensor_dls((x,y), (x,y), bs=4)
    for f in (extract_features, lambda m,d: extract_features(m, d.train), lambda m,d: knn(m, d, k=1), linear_probe, evaluate, sgd_probe):
        with pytest.raises(FloatingPointError, match=r'of \d+ rows.*whose training has diverged'): f(m, [dls.train.dataset[:4]] if f is extract_features else dls)
    bad = x.clone(); bad[[1,4],0,0,0] = v
    with pytest.raises((ValueError,FloatingPointError), match='the images hold NaN|2 of 21 rows of the features.*look at those images'): extract_features(Mean(), [bad])
    f = torch.rand(n,2); f[3,1] = v
    for test in ((f,y), (torch.rand(n,2),y)):
        for ask in (lambda a,b: knn(a, b, k=1), linear_probe):
            with pytest.raises(FloatingPointError, match='1 of 21 rows of (train|test)'): ask((f,y), test)
            with pytest.raises(FloatingPointError, match='1 of 21 rows of (train|test)'): ask(test, (f,y))

def test_a_probe_that_diverges():
    dls = tensor_dls((x,y), (x,y), bs=4)
    with pytest.raises(FloatingPointError, match=r'diverged in epoch 0: take a tenth of lr=1e\+38'): sgd_probe(Mean(), dls, epochs=3, lr=1e38, bs=4)
    with pytest.raises(FloatingPointError, match=r'lr=1e\+20 and lr_head=0.2'): fine_tune(Mean(), dls, n_per_class=2, epochs=9, lr=1e20, bs=2)
    with pytest.warns(UserWarning, match=r'guessing has 1.1: .*too high \(lr=1e\+06\)'): sgd_probe(Mean(), dls, epochs=2, lr=1e6, bs=4)
    with pytest.raises(FloatingPointError, match='features are too large'): linear_probe((torch.rand(n,2)*1e38,y), (torch.rand(n,2),y))

def test_out_of_memory_is_said_as_it_is():
    "It says nothing of the encoder"
    for e in (torch.OutOfMemoryError('CUDA out of memory'), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")):
        class Full(Mean):
            def forward(self, x, e=e): raise e
        with pytest.raises(RuntimeError, match='memory') as got: encoder_dim(Full(), n_in=3)
        assert got.value is e
    with pytest.raises(ValueError, match='does not run on images'): encoder_dim(nn.Linear(3,3), n_in=1)


# A GPU, which is pretended: fake tensors have a device and no values, and refuse whatever would read one

class Asked(nn.Module):
    "An encoder that says what it got"
    def __init__(self, dtype=torch.float32): super().__init__(); self.net,self.seen = nn.Linear(48, 7, dtype=dtype, device='cuda'),[]
    def forward(self, x): self.seen.append((x.device.type, len(x))); return self.net(x.flatten(1))

@pytest.fixture
def card(monkeypatch):
    "Calls to the streams of the card, and the precision that was asked for"
    said = []
    class Event:
        def synchronize(self): said.append('wait')
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda d: types.SimpleNamespace(record_event=lambda: said.append('sent') or Event()))
    monkeypatch.setattr(torch, 'autocast', lambda kind, dtype=None, enabled=True: said.append((kind, dtype, enabled)) or nullcontext())
    monkeypatch.setattr(features, 'check_finite_rows', lambda *args: None) # of what is on the CPU
    return said

@pytest.mark.parametrize('half,dtype,halves', [(None,torch.float32,True), (False,torch.float32,False), (True,torch.float32,True), (None,torch.float16,True), (None,torch.float64,False)])
def test_half_on_a_gpu(card, half, dtype, halves):
    "Unless it is told otherwise; a batch is fetched while the next one is computed, and labels at the end"
    with FakeTensorMode():
        m = Asked(dtype)
        m.seen = card
        f,t = extract_features(m, [(torch.empty(5,3,4,4, dtype=torch.uint8), torch.empty(5, dtype=torch.long, device='cuda')) for _ in range(3)], half=half)
    assert f.dtype==(torch.float16 if halves else torch.float32) and f.shape==(15,7) and f.device.type==t.device.type=='cpu' and len(t)==15
    asked = ('cuda',5)
    assert card==[('cuda',torch.float16,halves), asked,'sent', asked,'wait','sent', asked,'wait','sent', 'wait']

def test_no_half_on_a_cpu(): assert extract_features(Mean(), [x])[0].dtype==torch.float32

@pytest.mark.parametrize('known', [True,False])
def test_rows_that_come_later(monkeypatch, known):
    "What arrives only when it is waited for stands in its place, also where nobody said how many there are"
    want,left = extract_features(Mean(), [x])[0],[]
    def sent(t):
        res = torch.full_like(t, torch.nan)
        left.append(t)
        assert len(left)<3 # the one before is all that waits
        return res,lambda: left.remove(next(o for o in left if o is t)) or res.copy_(t)
    monkeypatch.setattr(features, '_sent', sent)
    batches = list(x.split(4))
    assert torch.equal(extract_features(Mean(), batches if known else iter(batches))[0], want) and not left

# Several processes

class Normed(nn.Module):
    def __init__(self): super().__init__(); self.bn,self.seen = nn.BatchNorm1d(3),0
    def forward(self, x): self.seen += len(x); return self.bn(x.mean((2,3)))

def _made_together(folder):
    "Features, labels and how many images it has seen, for loaders of fastai and PyTorch, shuffled; a list; and fewer images than processes"
    r = rank()
    m,res = Normed(),[]
    with torch.no_grad(): m.bn.running_mean += .1+r; m.bn.num_batches_tracked += r
    for dl in (tensor_dls((x,y), bs=4, device='cpu').train, td.DataLoader(ds, 4, shuffle=True), td.DataLoader(ds, 4, sampler=td.WeightedRandomSampler(w, 50)), Last(ds, bs=2), [(x,y)], td.DataLoader(td.Subset(ds, [3]), 4)):
        m.seen = 0
        f,t = extract_features(m, dl, all_ranks=True)
        res.append((f, t, m.seen))
    assert m.bn.running_mean[0]==pytest.approx(.1+r) and m.bn.num_batches_tracked==r # its own, as before
    alone = extract_features(m, td.DataLoader(ds, 4))[0] # nobody else has to come
    return res,alone

def test_features_are_made_together(tmp_path):
    "Each process makes a part, with the encoder of the first one, and all have all; a list and too few images are made by each"
    a,b = on_ranks(_made_together, tmp_path, 2)
    (ra,alone),(rb,_) = a,b
    for i,((f,t,n1),(f2,t2,n2)) in enumerate(zip(ra, rb)):
        ids = [18,19,20] if i==3 else [3] if i==5 else range(n)
        torch.testing.assert_close(f, alone[ids], atol=1e-6, rtol=1e-5)
        if i<4: assert torch.equal(f, f2) and {n1,n2}=={len(ids)//2, len(ids)-len(ids)//2}
        else: assert n1==n2==len(ids)
        assert torch.equal(t, y[ids]) and torch.equal(t, t2)

@pytest.mark.parametrize('sizes', [[3,3], [1,4,2]])
def test_rows_are_joined_in_blocks(monkeypatch, sizes):
    "Blocks of one row and more, of processes that have more or fewer; here the others are pretended"
    rows = torch.arange(sum(sizes)*2.).view(-1,2)
    parts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    at = [0]
    def gather(t, ns):
        assert len(t)==ns[0]
        at.append(at[-1]+max(ns))
        return torch.cat([rows[a+at[-2]:a+at[-2]+n] for a,n in zip(parts, ns)])
    monkeypatch.setattr(features, 'all_gather', gather)
    for block in (2**26, 2, 4):
        at[:] = [0]
        monkeypatch.setattr(features, '_block', block, raising=False)
        assert torch.equal(features._joined(rows[:sizes[0]], parts, 'cpu'), rows)
