import random
from contextlib import nullcontext
from statistics import mean, stdev

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import IntToFloatTensor, Normalize
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.vision.augment import RandTransform
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from self_supervised.core import SSLCallback
from self_supervised.data import fashion_mnist, image_dls, tensor_dls
from self_supervised.evaluation import Result, compare, evaluate, extract_features, fine_tune, knn, linear_probe, sample_per_class, sgd_probe
from self_supervised.vision.swav import SWAV, create_swav_model, get_swav_aug_pipelines

from methods import images, learner, methods


@pytest.fixture(scope='module')
def pixels():
    (x,y),(xt,yt) = fashion_mnist()
    return (x[:600].flatten(1)/255, y[:600]), (xt[:300].flatten(1)/255, yt[:300])

def clusters(n=200, classes=4, noise=.05, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n)%classes
    return torch.eye(classes)[y]+noise*torch.randn(n, classes, generator=g), y


# Features

def encoder(): return nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.Dropout(.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def test_order_and_mode():
    "In the order of the dataset from a shuffled loader that drops its last batch; dropout off, batch norm untouched, modes put back"
    x,y = torch.randint(0, 256, (50,1,8,8), dtype=torch.uint8),torch.arange(50)
    dls,m = tensor_dls((x,y), bs=8),encoder()
    m[1].eval(); m[2].train()
    before = {k:v.clone() for k,v in m.state_dict().items()}
    feats,labels = extract_features(m, dls.train)
    assert torch.equal(labels, y) and not m[1].training and m[2].training and m.training
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
    one_by_one = torch.stack([m.eval()(o[None].float()/255)[0] for o in x])
    torch.testing.assert_close(feats, one_by_one, rtol=1e-5, atol=1e-6)
    assert not feats.requires_grad and feats.dtype==torch.float32 and feats.device.type=='cpu'

def test_unlabelled_and_half():
    x = torch.rand(10,1,8,8)
    m = encoder().eval()
    feats,labels = extract_features(m.to(torch.bfloat16), tensor_dls(x, bs=4).train)
    assert labels is None and feats.dtype==torch.float32 and feats.shape==(10,4)

def test_a_loader_that_normalises_too():
    "Once is enough: by the statistics that are known, or else by the loader"
    set_seed(0)
    (x,y),m = (images(40), torch.arange(40)%2),nn.Sequential(nn.Flatten(), nn.Linear(196, 3, bias=False))
    raw,own = (tensor_dls((x,y), (x,y), bs=8, after_batch=[IntToFloatTensor(), *o]) for o in ([],[Normalize.from_stats([.3],[.2], cuda=False)]))
    stats = [.4],[.5]
    swav  = Learner(raw, create_swav_model(m, 8, 4, 5, n_features=3), cbs=SWAV(get_swav_aug_pipelines((2,1), (12,8), jitter=False, bw=False, blur=False, stats=stats), [0,1], K=None))
    flat  = x.flatten(1)/255
    def close(a, b): torch.testing.assert_close(extract_features(*a)[0], m[1](b).detach(), rtol=1e-4, atol=1e-5)
    for dls in (raw, own):
        close((swav, dls.train), (flat-.4)/.5)
        close((m, dls.train, stats), (flat-.4)/.5)
        close((m, dls.valid, stats), (flat-.4)/.5)
    close((m, own.train), (flat-.3)/.2)
    close((m, raw.train), flat)
    for f in (sgd_probe, fine_tune): # the same images in training too
        kwargs = dict(epochs=2, bs=8, stats=stats) | (dict(n_per_class=10) if f is fine_tune else {})
        assert str(f(m, raw, **kwargs))==str(f(m, own, **kwargs))
    assert knn(swav, raw, k=3).runs==knn(swav, own, k=3).runs

def test_a_learner_normalises_as_its_views_do():
    x = torch.rand(16,1,8,8)
    stats = ([.3],[.2])
    augs = get_swav_aug_pipelines((2,),(8,),(.5,),(1.,), jitter=False, bw=False, blur=False, stats=stats)
    learn = Learner(tensor_dls(x, bs=4), create_swav_model(encoder(), 8, 4, n_protos=5), cbs=SWAV(augs, [0,1], K=None))
    by_hand = learn.model.encoder.eval()((x-.3)/.2).detach()
    torch.testing.assert_close(extract_features(learn, learn.dls.train)[0], by_hand, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(extract_features(learn.model.encoder, learn.dls.train, stats=stats)[0], by_hand, rtol=1e-5, atol=1e-6)
    assert (extract_features(learn.model.encoder, learn.dls.train)[0]-by_hand).abs().max() > .01

@pytest.mark.parametrize('name', methods)
def test_the_encoder_of_a_method(name):
    "A Learner, its model and its encoder have the same features, also where the model gives projections of images"
    learn = learner(name)
    for o in (learn, learn.model): assert torch.equal(extract_features(o, learn.dls.valid)[0], extract_features(learn.model.encoder, learn.dls.valid)[0])
    learn.remove_cb(learn.cbs[-1])
    assert extract_features(learn, learn.dls.valid)[0].shape==(12,8)

def test_a_part_called_encoder():
    "Of a Learner with a method of one's own it is what is judged; elsewhere, as in torchvision's transformers, it is any part"
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.encoder = nn.Flatten()
        def forward(self, x): return self.encoder(x)[:,:3]
    m,dls = Model(),tensor_dls(torch.rand(6,1,4,4), bs=2)
    assert extract_features(m, dls.train)[0].shape==extract_features(Learner(dls, m), dls.train)[0].shape==(6,3)
    assert extract_features(Learner(dls, m, cbs=SSLCallback(get_swav_aug_pipelines((2,),(4,),(.5,),(1.,), stats=None))), dls.train)[0].shape==(6,16)

def test_modes_are_put_back_after_an_error():
    m = encoder()
    with pytest.raises(RuntimeError): extract_features(m, [(torch.rand(2,3,8,8),)])
    assert m.training and m[2].training

def test_kinds_of_loaders():
    "fastai's, PyTorch's in any order, lists, tensors without labels, and loaders that do not say how long they are"
    x,y,m = torch.rand(23,1,8,8),torch.arange(23),nn.Flatten()
    ds = TensorDataset(x, y)
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(ds)
    for dl in (tensor_dls((x,y), bs=4).train, DataLoader(ds, 4), DataLoader(ds, 4, shuffle=True, drop_last=True), DataLoader(Stream(), 4), [*DataLoader(ds, 4)]):
        feats,labels = extract_features(m, dl)
        assert torch.equal(feats, x.flatten(1)) and torch.equal(labels, y) and feats.untyped_storage().nbytes()==x.nbytes
    feats,labels = extract_features(m, list(x.split(5)))
    assert torch.equal(feats, x.flatten(1)) and labels is None

def test_no_augmentation():
    "Transforms that fastai keeps for training images are left out, and are there again afterwards"
    class Spoil(RandTransform):
        def encodes(self, x:torch.Tensor): return x+1
    x = torch.rand(6,1,4,4)
    dls = Datasets(range(6), [[x.__getitem__, Spoil()], [lambda i: i%2]], splits=[[0,1,2,3],[4,5]]).dataloaders(bs=2, num_workers=0)
    assert torch.equal(extract_features(nn.Flatten(), dls.train)[0], x[:4].flatten(1))
    assert all((b[0]>1).all() for b in dls.train)

def test_no_trace_in_the_random_generators():
    "Nor in the order of the loader, nor through an encoder that draws"
    class Draws(nn.Module):
        def forward(self, x): return x.flatten(1)+torch.rand(())+random.random()+np.random.rand()
    dl = tensor_dls(torch.rand(9,1,4,4), bs=2, seed=0).train
    states = lambda: (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), dl.rng.getstate())
    before = states()
    a,b = (extract_features(Draws(), dl)[0] for _ in range(2))
    assert states()==before and torch.equal(a, b)

def test_memory():
    "The features are the only tensor that grows: when a batch comes in, of those before nothing but their place in it is alive"
    import weakref
    seen,alive,m = [],[],nn.Flatten()
    class Encoder(nn.Module):
        def forward(self, x):
            alive.append(sum(o() is not None for o in seen))
            f = m(x)
            seen.append(weakref.ref(f))
            return f
    feats,_ = extract_features(Encoder(), tensor_dls(torch.rand(50,1,8,8), bs=5).train)
    assert len(seen)==10 and max(alive)<=1 and feats.untyped_storage().nbytes()==50*64*4

def test_half():
    m,x = encoder(),torch.rand(20,1,8,8)
    full,half = (extract_features(m, [x], half=h)[0] for h in (False, True))
    assert half.dtype==torch.float16 and 0<(full-half).abs().max()<.02
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(extract_features(m, [x])[0], full) # asked for full, is full

def test_device(monkeypatch):
    "Moved there and back, also after an error: the meta device, where nothing is computed, stands in for another"
    m,x,moves = encoder(),torch.rand(4,1,8,8),[]
    monkeypatch.setattr(m, 'to', moves.append)
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())
    with pytest.raises(RuntimeError, match='meta'): extract_features(m, [x], device='meta')
    assert moves==[torch.device('meta'), torch.device('cpu')] and m.training
    extract_features(m, [x], device='cpu'); assert len(moves)==2

@pytest.mark.parametrize('m,msg', [(nn.Identity(), r'\(4, 1, 8, 8\)'), (nn.ModuleDict(), None)])
def test_not_features(m, msg):
    if msg is None: m.forward = lambda x: (x.flatten(1),); msg = 'tuple'
    with pytest.raises(ValueError, match=msg): extract_features(m, [torch.rand(4,1,8,8)])

def test_empty():
    with pytest.raises(ValueError, match='empty'): extract_features(encoder(), [])


# Results

def test_result():
    r,one = Result('p', [.7,.8,.9], .95, dict(k=3, size=None)),Result('p', [.5])
    assert r.accuracy==pytest.approx(.8) and r.std==pytest.approx(.1) and float(r)==r.accuracy and one.std is None
    assert str(r)=='p: 80.0 ± 10.0 %, top-5 95.0 % (k=3)' and r.row()=='| p | 80.0 ± 10.0 | 95.0 | k=3 |' and one.row()=='| p | 50.0 |  |  |'
    assert str(one)=='p: 50.0 %' and repr(one).startswith("Result(protocol='p', runs=[0.5]")

def test_top5(pixels):
    "As counted by hand from scikit-learn's probabilities; a class without a vote is not among the five; none below ten classes"
    (x,y),(xt,yt) = pixels
    p = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, tol=1e-6)).fit(x.double(), y).predict_proba(xt.double())
    want = np.mean([t in np.argsort(-o)[:5] for o,t in zip(p, yt.tolist())])
    assert linear_probe(*pixels).top5==pytest.approx(want, abs=1.01/len(yt))
    p = KNeighborsClassifier(7, metric='cosine', weights=lambda d: np.exp((1-d)/.07)).fit(x, y).predict_proba(xt)
    want = np.mean([o[t]>0 and t in np.argsort(-o)[:5] for o,t in zip(p, yt.tolist())])
    assert knn(*pixels, k=7).top5==pytest.approx(want, abs=1e-6) and knn(*pixels, k=1).top5==knn(*pixels, k=1).accuracy
    assert knn(clusters(), k=3).top5 is None


# Nearest neighbours

def slow_knn(train, test, k, temp):
    "One query at a time, in plain Python"
    (x,y),(xt,yt) = ((a.double().numpy(),b.tolist()) for a,b in (train,test))
    n,hits = max(y+yt)+1,0
    for q,t in zip(xt, yt):
        sims = [float(q@o/np.linalg.norm(q)/np.linalg.norm(o)) for o in x]
        near = sorted(range(len(x)), key=lambda i: -sims[i])[:k]
        votes = [sum(np.exp(sims[i]/temp) for i in near if y[i]==c) for c in range(n)]
        hits += votes.index(max(votes))==t
    return hits/len(xt)

@pytest.mark.parametrize('k,temp', [(1,.07), (7,.07), (20,.5)])
def test_knn_equals_slow(pixels, k, temp):
    tr,te = tuple(o[:200] for o in pixels[0]),tuple(o[:60] for o in pixels[1])
    assert float(knn(tr, te, k=k, temp=temp))==pytest.approx(slow_knn(tr, te, k, temp), abs=1e-6)

def test_knn_equals_sklearn(pixels):
    "With a high temperature the votes are equal, which is scikit-learn's classifier on the unit sphere"
    (x,y),(xt,yt) = pixels
    want = KNeighborsClassifier(15, metric='cosine', weights=lambda d: np.exp((1-d)/.1)).fit(x, y).score(xt, yt)
    assert float(knn((x,y), (xt,yt), k=15, temp=.1))==pytest.approx(want, abs=1e-6)

def test_knn_chunks_and_scale(pixels):
    "Chunks of queries and of training features; what is left out is left out in any of them"
    tr,te = pixels
    want,loo = knn(tr, te),knn(tr)
    for chunk in (70, 100, 599, 600): assert (knn(tr, te, chunk=chunk).runs, knn(tr, te, chunk=chunk).top5)==(want.runs, want.top5)
    for chunk in (70, 100, 599): assert knn(tr, chunk=chunk).runs==loo.runs
    few = tuple(o[:40] for o in tr)
    assert knn(few, chunk=1).runs==knn(few, chunk=7).runs==knn(few).runs
    assert knn((tr[0]*100, tr[1]), (te[0]*.01, te[1])).runs==want.runs

def test_a_query_never_counts_itself(pixels):
    "By number, not by likeness: a duplicate counts, the query does not"
    x,y = (o[:200] for o in pixels[0])
    hits = 0
    for i in range(200):
        rest = torch.arange(200)!=i
        hits += slow_knn((x[rest],y[rest]), (x[i:i+1],y[i:i+1]), 5, .07)
    assert float(knn((x,y), k=5))==pytest.approx(hits/200)
    x,y = torch.randn(50,8),torch.arange(50) # nobody shares a class
    assert float(knn((x,y), k=1))==0. and float(knn((x,y), (x,y), k=1))==1.
    assert float(knn((torch.cat([x,x]),torch.cat([y,y])), k=1))==1.

def test_knn_half_and_low_temperature(pixels):
    "Half-precision features, which are not copied in full; and weights that would all be zero in float32"
    tr,te = pixels
    assert float(knn((tr[0].half(),tr[1]), (te[0].half(),te[1])))==pytest.approx(float(knn(tr, te)), abs=2.01/len(te[1]))
    x = torch.eye(3)
    assert float(knn((x,torch.tensor([1,1,0])), (-x[:2],torch.tensor([1,1])), k=3, temp=.005))<=1. # ties of opposites: no error, no NaN
    far = torch.tensor([[1.,0,0],[0,1.,0]]),torch.tensor([0,1])
    assert float(knn(far, (torch.tensor([[-1.,-.9,.1]]),torch.tensor([1])), k=2, temp=.001))==1.

def test_knn_known_answer():
    assert float(knn(clusters(), clusters(40, seed=1), k=5))==1.
    x,y = clusters()
    assert float(knn((x,y), (x,(y+1)%4), k=5))==0.

def test_from_an_encoder(pixels):
    "The same numbers from an encoder and DataLoaders, a pair of loaders, or features; and all of them in `evaluate`"
    (x,y),(xt,yt) = (tuple(o[:n] for o in s) for s,n in zip(fashion_mnist(), (200,100)))
    pixels = [tuple(o[:n] for o in s) for s,n in zip(pixels, (200,100))]
    dls = tensor_dls((x,y), (xt,yt), bs=64)
    pair = DataLoader(TensorDataset(x,y), 50, shuffle=True),[(xt,yt)]
    assert knn(nn.Flatten(), dls).runs==knn(nn.Flatten(), pair).runs==knn(*pixels).runs
    assert linear_probe(nn.Flatten(), dls).runs==linear_probe(*pixels).runs
    res = evaluate(nn.Flatten(), dls, k=5, n_per_class=10, seeds=2, C=.1)
    assert [o.protocol for o in res]==['k-NN(5)', 'linear, 10 labels a class', 'linear, all labels']
    assert [o.runs for o in res]==[o.runs for o in (knn(*pixels, k=5), linear_probe(*pixels, n_per_class=10, seeds=2, C=.1), linear_probe(*pixels, C=.1))]
    assert [o.protocol for o in evaluate(nn.Flatten(), dls, n_per_class=None, C=.1)]==['k-NN(20)', 'linear, all labels']


# Linear probe

@pytest.mark.parametrize('C', [.01, 1.])
def test_linear_probe_equals_sklearn(pixels, C):
    (x,y),(xt,yt) = pixels
    ref = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000, tol=1e-6)).fit(x.double(), y)
    assert float(linear_probe((x,y), (xt,yt), C=C))==pytest.approx(ref.score(xt.double(), yt), abs=1.01/len(yt)) # at most one image differs

def test_linear_probe_few_labels(pixels):
    "A run for each draw, those of `sample_per_class`"
    res = linear_probe(*pixels, n_per_class=5, seeds=3, C=.1)
    assert res.runs==[float(linear_probe(sample_per_class(pixels[0], 5, seed=i), pixels[1], C=.1)) for i in range(3)]
    assert res.accuracy==mean(res.runs) and res.std==stdev(res.runs)>0 and res.settings['train']==50

def test_linear_probe_known_answer():
    assert float(linear_probe(clusters(), clusters(40, seed=1)))==1.
    with torch.no_grad(): assert float(linear_probe(clusters(), clusters(40, seed=1)))==1. # inside no_grad too
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(2000,5, generator=g),torch.randint(0, 2, (2000,), generator=g)
    assert abs(float(linear_probe((x[:1000],y[:1000]), (x[1000:],y[1000:])))-.5) < .06 # nothing to find
    (x,y),(xt,yt) = clusters(333),clusters(40, seed=1) # a feature that is always the same in training, but for rounding, and not in the test
    dead,alive = torch.full((333,1), 12.3),1000*torch.randn(40,1)
    assert float(linear_probe((torch.cat([x,dead], 1),y), (torch.cat([xt,alive], 1),yt)))==1.
    assert float(linear_probe((x[:1],y[:1]), (xt,yt)))==.25 # one label


# Views

def shapes(n=120, seed=0, size=12):
    "Bright above, below, left or right, with noise; a mirror image and a crop of three quarters do not hide the first two"
    g = torch.Generator().manual_seed(seed)
    x,y = 40*torch.rand(n,1,size,size, generator=g),torch.arange(n)%2
    for i,c in enumerate(y): x[i,:,:size//2] += 150*(c==0); x[i,:,size//2:] += 150*(c==1)
    return x.byte(),y

class Halves(nn.Module):
    "Means of the upper and the lower half, through a batch norm"
    def __init__(self): super().__init__(); self.bn,self.drop = nn.BatchNorm2d(1),nn.Dropout(.5)
    def forward(self, x): return nn.functional.adaptive_avg_pool2d(self.drop(self.bn(x)), (2,1)).flatten(1)

def image_folder(path, n):
    from PIL import Image
    for i,(x,y) in enumerate(zip(*shapes(n))): (path/str(int(y))).mkdir(exist_ok=True); Image.fromarray(x[0].numpy()).save(path/str(int(y))/f'{i:03}.png')
    return path

def state(m): return {k:v.clone() for k,v in m.state_dict().items()}

@pytest.mark.parametrize('schedule', ['cosine', 'step'])
def test_sgd_probe(schedule):
    "Learns what there is to learn, in evaluation mode, and leaves no trace in encoder or random generators"
    m,dls,modes = Halves(),tensor_dls(shapes(), shapes(40, 1), bs=16),set()
    for o in (m.bn, m.drop): o.register_forward_hook(lambda o,*_: modes.add((type(o), o.training)))
    before,rng,drawn = state(m),torch.get_rng_state(),dls.train.rng.getstate()
    res = sgd_probe(m, dls, epochs=10, lr=1., bs=16, schedule=schedule, resize_scale=(.75,1.), seeds=2)
    assert res.accuracy==1. and len(res.runs)==2 and res.settings['train']==120 and res.settings['test']==40
    assert modes=={(nn.BatchNorm2d,False),(nn.Dropout,False)} and m.training and all(p.requires_grad and p.grad is None for p in m.parameters())
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and drawn==dls.train.rng.getstate()

class Record(Callback):
    order = 70
    def __init__(self, steps): self.steps = steps
    def before_step(self): self.steps.append(dict(lrs=[h['lr'] for h in self.opt.hypers], mom=self.opt.hypers[0]['mom'], wd=self.opt.hypers[0]['wd'],
                                                  size=tuple(self.xb[0].shape), pct=self.pct_train, modes=[o.training for o in self.model], grads=any(p.grad is not None for p in self.model[0].parameters()), y=self.yb[0].tolist()))

def record(monkeypatch):
    "Learning rates, momentum, weight decay and batch sizes of every step of the Learners in there"
    steps,fit = [],Learner.fit
    def _fit(self, *args, **kwargs):
        self.add_cb(Record(steps))
        return fit(self, *args, **kwargs)
    monkeypatch.setattr(Learner, 'fit', _fit)
    return steps

@pytest.mark.filterwarnings('ignore:after training the loss')
def test_protocols(monkeypatch):
    "The figures of the official code, at every step"
    steps = record(monkeypatch)
    dls = tensor_dls(shapes(), shapes(8, 1), bs=4)
    sgd_probe(Halves(), dls, epochs=5, size=10)
    assert [o['size'] for o in steps]==[(120,1,10,10)]*5 and all(o['modes']==[False,True] and not o['grads'] and (o['mom'],o['wd'])==(.9,1e-6) for o in steps)
    assert [o['lrs'][1] for o in steps]==pytest.approx([.15*(1+np.cos(np.pi*o['pct'])) for o in steps])
    steps.clear(); sgd_probe(Halves(), dls, epochs=10, schedule='step')
    assert [o['lrs'][1] for o in steps]==pytest.approx([.3]*6+[.03]*2+[.003]*2)
    for kw,(body,head),n in ((dict(pct=.01), (.02,5.), 2), (dict(pct=.1), (.01,.2), 12), (dict(n_per_class=3, lr=.5), (.5,.2), 6)):
        steps.clear(); res = fine_tune(Halves(), dls, epochs=10, **kw)
        for i,o in enumerate(steps):
            f = (1,.2,.04)[(i>=6)+(i>=8)]
            assert o['lrs']==pytest.approx([body*f, head*f]) and o['modes']==[True,True] and o['grads'] and (o['mom'],o['wd'])==(.9,0.)
            assert sorted(o['y'])==sorted([0,1]*(n//2)) # as many of each class
        assert len(steps)==10 and res.settings['train']==n

def test_same_step_as_torch(monkeypatch):
    "SGD with momentum and weight decay is PyTorch's: a linear layer trained by hand on the same views ends at the same weights"
    views,heads,fit = [],[],Learner.fit
    class Look(Callback):
        order = 70
        def before_batch(self): views.append((self.xb[0].clone(), self.yb[0].clone(), self.opt.hypers[-1]['lr']))
        def after_fit(self): heads.append({k:v.clone() for k,v in self.model[1].state_dict().items()})
        def before_fit(self): heads.append({k:v.clone() for k,v in self.model[1].state_dict().items()})
    monkeypatch.setattr(Learner, 'fit', lambda self, *a, **k: fit(self.add_cb(Look()), *a, **k))
    m = Halves().eval()
    sgd_probe(m, tensor_dls(shapes(), shapes(8, 1), bs=4), epochs=3, bs=32, wd=.1)
    head = nn.Linear(2,2); head.load_state_dict(heads[0])
    assert head.weight.std()<.03 and head.bias.abs().max()==0
    opt = torch.optim.SGD(head.parameters(), lr=1., momentum=.9, weight_decay=.1)
    for x,y,lr in views:
        opt.param_groups[0]['lr'] = lr
        opt.zero_grad(); nn.functional.cross_entropy(head(m(x).detach()), y).backward(); opt.step()
    assert len(views)==3*4
    for k,v in head.state_dict().items(): torch.testing.assert_close(v, heads[1][k])

def test_fine_tune(tmp_path):
    "The encoder that came in stays; the copy learns; each seed draws other labels, and the same again"
    m,dls = Halves(),tensor_dls(shapes(), shapes(40, 1), bs=16)
    before = state(m)
    kw = dict(n_per_class=4, epochs=10, bs=4, lr=.1, resize_scale=(.75,1.), seeds=2)
    set_seed(1); a = fine_tune(m, dls, **kw)
    set_seed(2); b = fine_tune(m, dls, **kw)
    assert a.runs==b.runs and a.accuracy>.9
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items()) and m.training and all(p.requires_grad for p in m.parameters())

@pytest.mark.parametrize('kind', ['tensor_dls', 'image_dls', 'Datasets', 'no labels known'])
def test_labels_without_images(kind, tmp_path, monkeypatch):
    "A few labels are found without reading the images, where labels are known; and belong to the images"
    x,y = shapes(40)
    if kind=='tensor_dls': dls = tensor_dls((x,y), shapes(8, 1), bs=4)
    elif kind=='image_dls': dls = image_dls(image_folder(tmp_path, 48), lambda o: o.parent.name, size=12, n_in=1, bs=4, valid_pct=1/6)
    elif kind=='Datasets': dls = Datasets(range(48), [[lambda i: shapes(48)[0][i]], [lambda i: i%2]], splits=[range(40), range(40,48)]).dataloaders(bs=4, num_workers=0)
    else: dls = DataLoaders.from_dsets(list(zip(x,y)), list(zip(*shapes(8, 1))), bs=4, num_workers=0)
    seen,steps = [],record(monkeypatch)
    get = type(dls.train).create_item if kind!='tensor_dls' else type(dls.train).do_item
    monkeypatch.setattr(type(dls.train), get.__name__, lambda self,i: (i is None or seen.append(i), get(self,i))[1])
    res = fine_tune(Halves(), dls, n_per_class=3, epochs=2, bs=6)
    assert res.settings['train']==6 and res.settings['test']==8 and all(sorted(o['y'])==[0,0,0,1,1,1] for o in steps)
    assert len(seen)==2*6+8 + 4+4 + (0 if kind!='no labels known' else 40+8) # two epochs, the test, a batch of each loader to look at, and all once where nothing is known

def test_a_last_batch_of_one():
    "Batch norm in training mode cannot do with it"
    m = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(4))
    fine_tune(m, tensor_dls(shapes(18), shapes(8, 1), bs=4), pct=1., epochs=1, bs=17)

@pytest.mark.parametrize('stats', [None, ([.4],[.2])])
def test_views_that_the_loader_draws(stats, monkeypatch):
    "`resize_scale=None`: every image goes in as the loader gives it, neither cut nor mirrored; bytes become floats, normalised or not"
    fit,seen = Learner.fit,[]
    class Look(Callback):
        order = 70
        def before_batch(self): seen.extend(zip(self.xb[0].clone(), self.yb[0].tolist()))
    monkeypatch.setattr(Learner, 'fit', lambda self, *a, **k: fit(self.add_cb(Look()), *a, **k))
    x,y = shapes(8)
    for dls in (tensor_dls((x,y), shapes(8, 1), bs=4), DataLoaders.from_dsets(list(zip(x,y)), list(zip(*shapes(8, 1))), bs=4, num_workers=0)):
        seen.clear()
        r = sgd_probe(Halves(), dls, epochs=1, bs=3, resize_scale=None, stats=stats)
        want = {(str(((o/255-.4)/.2 if stats else o/255).numpy().round(4)), int(c)) for o,c in zip(x,y)}
        assert {(str(o.numpy().round(4)), c) for o,c in seen}==want and r.settings['size'] is None and r.settings['resize_scale'] is None

def test_normalised_as_in_pretraining(monkeypatch):
    "The statistics of the Learner's views, for training views and test images alike"
    augs = get_swav_aug_pipelines((2,),(8,),(.5,),(1.,), jitter=False, bw=False, blur=False, stats=([.4],[.2]))
    learn = Learner(tensor_dls(images(8), bs=4), create_swav_model(Halves(), 8, 4, n_protos=5, n_features=2), cbs=SWAV(augs, [0,1], K=None))
    seen = []
    flat = torch.full((8,1,12,12), .4),torch.arange(8)%2
    monkeypatch.setattr(Halves, 'forward', lambda self, x: (seen.append(x.abs().max().item()), x[:,:,:2,0].flatten(1)+0*self.bn.weight)[1])
    res = fine_tune(learn, tensor_dls(flat, flat, bs=4), n_per_class=2, epochs=1)
    assert len(seen)>=3 and max(seen)<1e-5 and res.settings['stats']==([pytest.approx(.4)],[pytest.approx(.2)])


# Tables

def test_compare():
    a,b = Result('k-NN(20)', [.5]),[Result('linear', [.7,.8]), Result('k-NN(20)', [.25])]
    res = compare(dict(one=a, both=b))
    assert str(res).splitlines()==['| accuracy in % | k-NN(20) | linear     |', '|---------------|----------|------------|',
                                   '| one           | 50.0     |            |', '| both          | 25.0     | 75.0 ± 7.1 |']
    assert res._repr_markdown_()==str(res)==repr(res) and res['both']['linear'] is b[0]
    res = compare({'pixels': nn.Flatten(), 'by hand': a}, tensor_dls(*((x[:200],y[:200]) for x,y in fashion_mnist()), bs=100), k=3, n_per_class=None)
    assert list(res['pixels'])==['k-NN(3)', 'linear, all labels']
    with pytest.raises(ValueError, match="'pixels' is a Flatten.*pass labelled `dls`"): compare({'pixels': nn.Flatten()})
    with pytest.raises(TypeError, match="'a' must be an encoder"): compare(dict(a=.5))
    with pytest.raises(TypeError, match='k, dls: for evaluate, but there is no encoder'): compare(dict(a=a), labelled(), k=3)
    with pytest.raises(ValueError, match="'a' has several results of one protocol"): compare(dict(a=[a,a]))


# Draws

def test_sample_per_class():
    x,y = torch.arange(100)[:,None],torch.arange(100)%5
    a,b,c = sample_per_class((x,y), 3),sample_per_class((x,y), 3),sample_per_class((x,y), 3, seed=1)
    assert a[1].bincount().tolist()==[3]*5 and torch.equal(y[a[0][:,0]], a[1]) and len(a[0].unique())==15
    assert torch.equal(a[0], b[0]) and not torch.equal(a[0], c[0])
    state = torch.get_rng_state(); sample_per_class((x,y), 3); assert torch.equal(state, torch.get_rng_state())

d = clusters(8)
def labelled(x=None, **kw): return tensor_dls(*([shapes(16), shapes(8)] if x is None else x), bs=4, **kw)
@pytest.mark.parametrize('f,msg', [
    (lambda: knn(d, d, k=0), 'k=0'), (lambda: knn(d, d, k=9), 'k=9 neighbours of 8'), (lambda: knn(d, k=8), 'k=8 neighbours of 7'),
    (lambda: knn(d, d, k=1, temp=0), 'temp=0 must be positive'), (lambda: knn(d, d, k=1, chunk=0), 'chunk=0'),
    (lambda: knn((d[0],None), d), 'train has no labels'), (lambda: knn(d[0], d), 'train is a Tensor, it must be a pair'),
    (lambda: knn((d[0],d[1].float()), d), 'train has labels of type torch.float32'), (lambda: knn(d, (d[0],d[1]-1)), 'test has labels.*below 0'),
    (lambda: knn((d[0],d[0].long()), d), r'train has labels of type torch.int64 and shape \(8, 4\)'), (lambda: knn((d[0][:0],d[1][:0]), d), 'train is empty'),
    (lambda: knn(d, (d[0][:,:2],d[1]), k=1), 'train has 4 features an image and test 2'), (lambda: knn(d, d, half=True), 'half: for extract_features'),
    (lambda: knn(nn.Flatten(), labelled().train), 'dls is a TensorDL'), (lambda: knn(nn.Flatten()), 'dls is a NoneType'),
    (lambda: knn(nn.Flatten(), tensor_dls(shapes(16), bs=4)), 'empty'), (lambda: knn(nn.Flatten(), labelled((shapes(16)[0],shapes(8)[0])), k=1), 'train has no labels'),
    (lambda: linear_probe(d, (d[0],d[1][:-1])), 'test has 8 features and 7 labels'), (lambda: linear_probe(d, None), 'test is None'),
    (lambda: linear_probe(d, d, C=0), 'C=0 must be positive'), (lambda: linear_probe(d, d, seeds=0), 'seeds=0'), (lambda: linear_probe(d, d, seeds=3), 'seeds=3: on all labels.*n_per_class'),
    (lambda: linear_probe(nn.Flatten(), labelled(), seeds=3), 'seeds=3'), (lambda: linear_probe(d, d, n_per_class=3), 'n=3'), (lambda: linear_probe(d, d, n_per_class=0), 'n=0'),
    (lambda: sample_per_class(d, 3), 'n=3.*the largest class has 2'), (lambda: sample_per_class(d, 0), 'n=0'),
    (lambda: sgd_probe(Halves(), labelled(), schedule='linear'), "schedule='linear' must be one of cosine, step"), (lambda: sgd_probe(Halves(), labelled(), epochs=0), 'epochs=0'),
    (lambda: sgd_probe(Halves(), labelled(), lr=0), 'linear layer, 0, must be positive'), (lambda: sgd_probe(Halves(), [[shapes(8)],[shapes(8)]]), 'dls.train is a list.*give a DataLoader of fastai'),
    (lambda: sgd_probe(Halves(), labelled((shapes(16)[0],shapes(8)[0]))), 'has no labels'), (lambda: sgd_probe(Halves(), tensor_dls(shapes(16), bs=4)), 'is empty'),
    (lambda: sgd_probe(Halves(), labelled(), size=8, resize_scale=None), 'size=8: .*views already'),
    (lambda: fine_tune(Halves(), labelled()), 'pct=None, n_per_class=None: give one'), (lambda: fine_tune(Halves(), labelled(), pct=.1, n_per_class=3), 'give one'),
    (lambda: fine_tune(Halves(), labelled(), pct=10), 'pct=10'), (lambda: fine_tune(Halves(), labelled(), n_per_class=9), 'n=9.*the largest class has 8'),
    (lambda: fine_tune(Halves(), labelled(), pct=.1, lr=0), 'lr=0 must be positive'), (lambda: fine_tune(Halves(), labelled(), pct=0), 'pct=0'), (lambda: fine_tune(Halves(), labelled(), n_per_class=0), 'n_per_class=0')])
def test_wrong_use(f, msg):
    with pytest.raises((ValueError,TypeError), match=msg): f()

def test_the_classifier_is_judged_in_full_precision(monkeypatch):
    "Also on a GPU, where features would be halved: its answers are what is compared"
    from self_supervised import protocols
    seen,real = [],protocols.extract_features
    monkeypatch.setattr(protocols, 'extract_features', lambda *args, **kw: seen.append(kw['half']) or real(*args, **kw))
    x = torch.randint(0, 256, (12,3,8,8), dtype=torch.uint8)
    dls = tensor_dls((x, torch.arange(12)%2), (x, torch.arange(12)%2), bs=4, device='cpu')
    sgd_probe(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), dls, epochs=1, bs=4)
    assert len(seen)==2 and not any(o or o is None for o in seen)
