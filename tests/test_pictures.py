"Pictures: what is drawn is read back from the axes and compared with the data"
import random

import matplotlib.pyplot as plt, numpy as np, pytest, torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader as FastaiDataLoader
from fastai.data.transforms import IntToFloatTensor, Normalize
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from torch import nn
from torch.utils import data as torch_data
from torch.utils._python_dispatch import TorchDispatchMode

from methods import augs, callback, model
from self_supervised.augmentations import NormalizeView
from self_supervised.basics import warn_once
from self_supervised.core import SSLCallback
from self_supervised.data import image_dls, tensor_dls
from self_supervised.diagnostics import plot_codes, plot_map, show_neighbors, show_prototypes
from self_supervised.vision.dino import DINOHead, DINOModel
from self_supervised.vision.swav import SWAV, SwAVModel


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')

def drawn(ax):
    "The pixels of the one picture in `ax`, (C,H,W)"
    im, = ax.images
    assert im.get_clim()==(0,1)
    a = torch.from_numpy(np.asarray(im.get_array())).float()
    return a[None] if a.ndim==2 else a.permute(2,0,1)

def visible(x):
    "What of images (N,C,H,W), uint8 or float, is to be seen"
    x = x.float()/255 if x.dtype==torch.uint8 else x
    return x[:,:3] if x.shape[1] in (3,4) else x[:,:1]

def number(ax, x):
    "Which of the images `x`, all different, is drawn in `ax`"
    i, = (visible(x)-drawn(ax)).abs().amax((1,2,3)).lt(1e-5).nonzero().flatten().tolist()
    return i

def pixels(n=30, c=1, h=6, w=5): return torch.randint(0, 256, (n,c,h,w), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

def neighbors(q, bank, k, own=True):
    "Numbers of the nearest, by an explicit loop"
    res = []
    for i,a in enumerate(q):
        sims = [(-float(a@b/a.norm()/b.norm()), j) for j,b in enumerate(bank) if not (own and i==j)]
        res.append([j for _,j in sorted(sims)[:k]])
    return res


# Prototypes with a known answer: one pixel is lit, the others are as bright as an image is far from its prototype

lit   = [4]*7 + [0]*5 + [8]*4 + [2]*2 # prototype of each image, a pixel of 3×3
order = torch.randperm(18, generator=torch.Generator().manual_seed(3))

def lit_images():
    "Images, shuffled, and the numbers of those of each pixel, nearest first"
    x,haze = torch.zeros(18,9),torch.linspace(.1, .4, 18)
    for i,p in enumerate(lit): x[i],x[i,p] = haze[i],1
    x = x[order].view(18,1,3,3)
    by_haze = sorted(range(18), key=lambda i: haze[order[i]])
    return x, {p:[i for i in by_haze if lit[order[i]]==p] for p in set(lit)}

def lit_model(encoder=None):
    m = SwAVModel(nn.Flatten() if encoder is None else encoder, nn.Identity(), nn.Linear(9, 9, bias=False))
    m.prototypes.weight.data = torch.diag(torch.linspace(1, 9, 9)) # lengths that must not matter
    return m

@pytest.mark.parametrize('bs,part', ((1,1), (4,0), (4,1), (18,0), (64,1)))
def test_prototypes(bs, part):
    "In a shuffled loader that drops its last batch as in one in order"
    x,near = lit_images()
    dl = tensor_dls(x, x, bs=min(bs, 18))[part]
    axes = show_prototypes(lit_model(), dl, n=3, k=4, figsize=(4,3))
    assert [number(o, x) for o in axes]==near[4][:4]+near[0][:4]+near[8][:4]
    assert [o.texts[0].get_text() for o in axes[::4]]==[f'4\n{7/18:.1%}', f'0\n{5/18:.1%}', f'8\n{4/18:.1%}']
    assert not any(o.texts for i,o in enumerate(axes) if i%4)
    assert tuple(axes[0].figure.get_size_inches())==(4,3)

def test_prototypes_of_a_head_that_goes_on_to_scores():
    "DINO's classes: directions in the space of the bottleneck"
    x,near = lit_images()
    head = DINOHead(9, 9, norm_last_layer=False, nlayers=1, bottleneck_dim=9)
    head.mlp,head.last_layer.weight_v.data = nn.Identity(),torch.diag(torch.linspace(1, 9, 9))
    head.last_layer.weight_g.data = torch.linspace(9, 1, 9)[:,None] # lengths that must not matter either
    m,dl = DINOModel(nn.Sequential(nn.Flatten(), head)),tensor_dls(x, bs=4).train
    assert [number(o, x) for o in show_prototypes(m, dl, n=3, k=4)]==near[4][:4]+near[0][:4]+near[8][:4]
    assert plot_codes(m, dl)[0].patches[0].get_data().values.tolist()==[7,5,4,2,0,0,0,0,0]

def test_prototypes_without_images_have_no_row():
    x,near = lit_images()
    axes = show_prototypes(lit_model(), tensor_dls(x, bs=4).train, n=9, k=30)
    assert len(axes)==4*18 # no more images than there are
    assert [number(o, x) for o in axes[:7]]==near[4] and len({number(o, x) for o in axes[:18]})==18

def test_codes():
    x,_ = lit_images()
    axes = plot_codes(lit_model(), tensor_dls(x, bs=4).train, figsize=(5,2))
    ax, = axes
    assert ax.patches[0].get_data().values.tolist()==[7,5,4,2,0,0,0,0,0]
    assert [o.get_text() for o in ax.get_legend().get_texts()]==['4 of 9 prototypes have images', '2 images: all alike']
    assert ax.lines[0].get_ydata()[0]==2 and tuple(ax.figure.get_size_inches())==(5,2)

def test_whose_prototypes():
    "Those that the method names, of several heads the first: the Learner's method, or the one that the model belongs to, wrapped or not"
    x,_ = lit_images()
    dl  = tensor_dls(x, bs=4).train
    class Own(nn.Module):
        def __init__(self): super().__init__(); self.encoder,self.projector,self.where = nn.Flatten(),nn.Identity(),torch.eye(9)
    class Method(SSLCallback):
        @staticmethod
        def heads(model): return torch.stack([model.where[[4,0]], model.where[[1,3]]])
    own = Learner(tensor_dls(x, bs=4), Own(), cbs=Method(augs('simclr', 3)))
    assert show_prototypes(own, dl, n=1, k=1)[0].texts[0].get_text()[0]=='0' and len(plot_codes(own, dl)[0].patches[0].get_data().values)==2
    with pytest.raises(ValueError, match='Own.*no `prototypes`'): plot_codes(own.model, dl)
    m = model('deepcluster', enc=nn.Flatten(), n_protos=9, projection_size=9, n_features=9, n_heads=2)
    m.projector,m.prototypes.weight.data = nn.Identity(),torch.cat([torch.eye(9), torch.eye(9)[[0]*9]])
    for o in (m, nn.DataParallel(m), torch.compile(lit_model(), backend='eager')):
        assert plot_codes(o, dl)[0].patches[0].get_data().values.tolist()==[7,5,4,2,0,0,0,0,0]

def test_projector_is_in_eval_mode():
    "A batch of one image through batch norm, and nothing of it is remembered"
    x,near = lit_images()
    m = lit_model()
    m.projector = nn.Sequential(nn.Dropout(.9), nn.BatchNorm1d(9, affine=False))
    axes = show_prototypes(m, tensor_dls(x, bs=1).train, n=1, k=7)
    assert [number(o, x) for o in axes]==near[4] and m.projector.training and m.projector[1].num_batches_tracked==0

def test_learner_default_loader():
    "The validation images if there are any, else those for training; of DataLoaders as of a Learner"
    x,near = lit_images()
    for dls,want in ((tensor_dls(x[:9], x, bs=3), near[4][0]), (tensor_dls(x, bs=3), near[4][0])):
        learn = Learner(dls, lit_model(), cbs=SWAV(augs('swav', 3), [0,1], K=None))
        for ax in (show_prototypes(learn, n=1, k=1)[0], show_prototypes(learn, dls, n=1, k=1)[0]): assert number(ax, x)==want
        assert plot_codes(learn)[0].patches[0].get_data().values.sum()==18
        assert len(plot_map(learn)[0].collections[0].get_offsets())==18
    assert len(plot_map(nn.Flatten(), DataLoaders(torch_data.DataLoader(x, 4)))[0].collections[0].get_offsets())==18

def test_memory():
    "Neither all images nor all scores are ever in one tensor"
    class Largest(TorchDispatchMode):
        size = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            res = func(*args, **(kwargs or {}))
            self.size = max(self.size, *(o.numel() for o in (res if isinstance(res, (tuple,list)) else [res]) if isinstance(o, torch.Tensor)), 0)
            return res
    batches = [(torch.rand(10,1,3,3),) for _ in range(50)]
    m = SwAVModel(nn.Flatten(), nn.Identity(), nn.Linear(9, 40, bias=False))
    with Largest() as o: show_prototypes(m, batches, n=2, k=3)
    assert 0 < o.size <= (10+3)*40


# What is drawn is what is in the data

def torch_dl(x, **kwargs): return torch_data.DataLoader([(o,i) for i,o in enumerate(x)], 8, **kwargs)

norm = [.3],[.2]
loaders = {
    'tensor_dls':          lambda x: tensor_dls(x, bs=8).train,
    'labels':              lambda x: tensor_dls((x,torch.arange(len(x))%3), bs=8).train,
    'int to float':        lambda x: tensor_dls(x, bs=8, after_batch=[IntToFloatTensor()]).train,
    'float':               lambda x: tensor_dls(x/255, bs=8).train,
    'normalised':          lambda x: tensor_dls(x, bs=8, after_batch=[IntToFloatTensor(), Normalize.from_stats(*norm, cuda=False)]).train,
    'normalised labels':   lambda x: tensor_dls((x,torch.rand(len(x))), bs=8, after_batch=[IntToFloatTensor(), Normalize.from_stats(*norm, cuda=False)]).train,
    'normalised float':    lambda x: tensor_dls(x/255, bs=8, after_batch=[Normalize.from_stats(*norm, cuda=False)]).train,
    'NormalizeView':       lambda x: tensor_dls(x, bs=8, after_batch=[NormalizeView(*(o*x.shape[1] for o in norm))]).train,
    'fastai, plain':       lambda x: FastaiDataLoader(x, bs=8, shuffle=True),
    'torch':               lambda x: torch_dl(x),
    'torch, shuffled':     lambda x: torch_dl(x, shuffle=True, drop_last=True),
    'torch, float':        lambda x: torch_dl(x/255),
    'list of pairs':       lambda x: [(x[:11],torch.arange(11)), (x[11:],torch.arange(len(x)-11))],
    'list of tensors':     lambda x: [x[:11], x[11:]],
}

@pytest.mark.parametrize('name,c', [*((o,3) for o in loaders), ('tensor_dls',1), ('normalised',1), ('normalised',4), ('torch, shuffled',13)])
def test_neighbors_are_drawn_as_they_are(name, c):
    x   = pixels(c=c)
    see = (x/255 - norm[0][0])/norm[1][0] if 'ormal' in name else x/255 # what the encoder gets
    axes = show_neighbors(nn.Flatten(), loaders[name](x), [7,29,7], k=2)
    want = neighbors(see.flatten(1), see.flatten(1), 2)
    assert [number(o, x) for o in axes]==[i for q in (7,29,7) for i in (q,*want[q])]
    assert drawn(axes[0]).shape[0]==(3 if c in (3,4) else 1)

def test_no_order_to_be_had():
    "A sampler of its own: numbers are places in a pass, and both passes are the same"
    x  = pixels()
    dl = torch_data.DataLoader(torch_data.TensorDataset(x), 8, sampler=torch_data.SubsetRandomSampler(range(20)))
    axes = show_neighbors(nn.Flatten(), dl, range(20), k=2)
    ids  = [[number(o, x) for o in axes[i:i+3]] for i in range(0, 60, 3)]
    assert sorted(o[0] for o in ids)==list(range(20))
    want = neighbors(x[:20].flatten(1).float(), x[:20].flatten(1).float(), 2)
    assert all(o[1:]==want[o[0]] for o in ids)

def test_no_clipping(caplog):
    "Undone normalisation is a little off, and matplotlib would say so for every image"
    dl = tensor_dls(255*pixels(c=3).gt(127).byte(), bs=8, after_batch=[IntToFloatTensor(), Normalize.from_stats([.01,.22,.43],[.23,.1,.2], cuda=False)]).train # numbers that miss 0 and 1
    show_neighbors(nn.Flatten(), dl, range(10), k=5)
    assert 'Clipping' not in caplog.text

def test_collate():
    "A loader's own way to make a batch"
    x  = pixels()
    dl = torch_data.DataLoader([dict(image=o) for o in x], 8, collate_fn=lambda b: [torch.stack([o['image'] for o in b])], shuffle=True)
    want = neighbors(x.flatten(1).float(), x.flatten(1).float(), 2)
    assert [number(o, x) for o in show_neighbors(nn.Flatten(), dl, 9, k=2)]==[9,*want[9]]

def test_reads_only_what_it_shows():
    "The second time a loader with an index loads the images of the picture, and no others"
    class Data:
        def __init__(self, x): self.x,self.read = x,[]
        def __len__(self): return len(self.x)
        def __getitem__(self, i):
            self.read.append(i)
            return self.x[i],0
    x = pixels()
    for make in (lambda ds: torch_data.DataLoader(ds, 8), lambda ds: torch_data.DataLoader(ds, 8, shuffle=True), lambda ds: FastaiDataLoader(ds, bs=8, shuffle=True)):
        ds = Data(x)
        axes = show_neighbors(nn.Flatten(), make(ds), [3,20], k=2)
        shown = [number(o, x) for o in axes]
        assert sorted(ds.read)==sorted([*range(30), *{3,20}, *{shown[i] for i in (1,2,4,5)}])

def test_iterable():
    "A stream has no index"
    class Stream(torch_data.IterableDataset):
        def __iter__(self): return iter(zip(x, range(30)))
    x = pixels()
    want = neighbors(x.flatten(1).float(), x.flatten(1).float(), 2)
    for dl in (torch_data.DataLoader(Stream(), 7), FastaiDataLoader(Stream(), bs=7)):
        assert [number(o, x) for o in show_neighbors(nn.Flatten(), dl, [13,2], k=2)]==[13,*want[13],2,*want[2]]

@pytest.mark.parametrize('make', (
    lambda path: image_dls(path, size=(12,10), bs=4, device='cpu'),
    lambda path: image_dls(path, label_func=lambda o: o.stem[-1], size=(12,10), bs=4, device='cpu'),
    lambda path: ImageDataLoaders.from_name_func(path, sorted(path.glob('*.png')), lambda o: o[-5], valid_pct=0, bs=4, num_workers=0, device='cpu',
                                                 item_tfms=Resize((12,10)), batch_tfms=[Normalize.from_stats([.4,.5,.6],[.1,.2,.3], cuda=False)]),
), ids=('image_dls', 'labelled', 'ImageDataLoaders'))
def test_files(make, tmp_path):
    x = pixels(12, 3, 12, 10)
    for i,o in enumerate(x): Image.fromarray(o.permute(1,2,0).numpy()).save(tmp_path/f'{i:02}{i%2}.png')
    dls  = make(tmp_path)
    name = [int(str(o)[-7:-5]) for o in dls.train.items] # number in the dataset → number of the file
    axes = show_neighbors(nn.Flatten(), dls.train, [3,1], k=2)
    assert [number(axes[i], x) for i in (0,3)]==[name[3],name[1]]
    ax, = plot_map(nn.Flatten(), dls.train, thumbs=3)
    assert 1 < len(ax.images) <= 9

def test_unknown_normalisation_is_drawn_rescaled():
    warn_once.cache_clear()
    x = torch.randn(10,1,4,4, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match='drawn rescaled') as w:
        for _ in range(2): axes = show_neighbors(nn.Flatten(), torch_dl(x), [0,1], k=9)
    assert len([o for o in w if 'rescaled' in str(o.message)])==1
    x -= x.amin((1,2,3), keepdim=True)
    x /= x.amax((1,2,3), keepdim=True)
    assert [number(o, x) for o in axes[::10]]==[0,1] and sorted(number(o, x) for o in axes[:10])==list(range(10))


# Neighbours

def on_circle(n=12):
    "Images of two pixels, directions in the first quarter, and their angles"
    a = torch.linspace(.1, 1.4, n)**2/1.4
    a = a[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    return torch.stack([a.cos(), a.sin()], 1).view(n,1,1,2), a

def test_neighbors_on_a_circle():
    x,a = on_circle()
    x = x*torch.linspace(.3, 1, 12).view(-1,1,1,1) # the length does not matter
    axes = show_neighbors(nn.Flatten(), tensor_dls(x, bs=5).train, [4,0], k=5, figsize=(7,2))
    for q,row in ((4,axes[:6]), (0,axes[6:])):
        gap  = (a-a[q]).abs()
        want = gap.argsort()[:6].tolist()
        assert [number(o, x) for o in row]==want and want[0]==q
        assert [o.get_title() for o in row]==[f'#{q}']+[f'{gap[i].cos():.2f}' for i in want[1:]]
    assert tuple(axes[0].figure.get_size_inches())==(7,2)

def test_neighbors_never_count_themselves():
    "Not even among copies; in a bank of other images there is nobody to leave out"
    x = pixels(6)
    x = torch.cat([x, x[:1]])
    dls = tensor_dls(x, x, bs=3)
    for bank in (None, dls.train):
        axes = show_neighbors(nn.Flatten(), dls.train, [0], k=6, bank=bank)
        assert [o.get_title() for o in axes[:2]]==['#0','1.00'] and axes[2].get_title()!='1.00'
        assert torch.equal(drawn(axes[1]), drawn(axes[0])) and sorted(number(o, x[:6]) for o in axes[1:])==list(range(6))
    axes = show_neighbors(nn.Flatten(), dls.train, 2, k=7, bank=dls.valid)
    assert number(axes[1], x[:6])==2 and len(axes)==8

def test_neighbors_in_a_bank():
    x,b = pixels(5),pixels(40)[5:]
    axes = show_neighbors(nn.Flatten(), tensor_dls(x, bs=2).train, torch.tensor([3,1]), k=4, bank=DataLoaders(torch_dl(b)))
    want = neighbors(x.flatten(1).float(), b.flatten(1).float(), 4, own=False)
    assert [number(o, x) for o in axes[::5]]==[3,1]
    assert [number(o, b) for i in (1,6) for o in axes[i:i+4]]==want[3]+want[1]


# Maps

def points(ax): return torch.tensor(np.concatenate([o.get_offsets() for o in ax.collections])).float()

class Turn(nn.Module):
    "A plane in space: two pixels → features (B,10), lengths and angles as before"
    def __init__(self):
        super().__init__()
        self.q = torch.linalg.qr(torch.randn(10,2))[0]
    def forward(self, x): return x.flatten(1)@self.q.T

def test_pca_of_a_plane():
    x,a = on_circle(40)
    ax, = plot_map(Turn(), tensor_dls(3*x/8, bs=7).train, figsize=(3,3))
    far = lambda p: (p[:,None]-p).norm(dim=2)
    torch.testing.assert_close(far(points(ax)), far(x.flatten(1)), rtol=1e-4, atol=1e-5)
    assert points(ax)[:,0].var() > points(ax)[:,1].var() and ax.get_aspect()==1
    assert tuple(ax.figure.get_size_inches())==(3,3) and ax.get_legend() is None

def test_map_of_a_part():
    "Another number draws a part of the same, and each data set its own images of all places"
    x,_ = on_circle(100)
    def drawn_of(n): return torch.cdist(points(plot_map(nn.Flatten(), tensor_dls(x, bs=30).train, n=n, method=lambda f: f)[0]), x.flatten(1)).argmin(1).tolist()
    few,more = drawn_of(20),drawn_of(50)
    assert len(set(few))==20 and few==drawn_of(20)==sorted(few) and set(few)<set(more) and len(more)==50
    assert few[0]<30 and few[-1]>70 and drawn_of(100)==drawn_of(101)==drawn_of(None)==list(range(100))

def test_map_colours_are_classes():
    x,a = on_circle(20)
    y   = torch.arange(20)%3+1 # no image of the first class
    dls = tensor_dls((x,y), bs=6, vocab=['no','red','green','blue'])
    for dl,vocab,want in ((dls.train, None, ['red','green','blue']), (torch_data.DataLoader(torch_data.TensorDataset(x, y), 6), None, ['1','2','3']),
                          (dls.train, ['n','r','g','b'], ['r','g','b'])):
        ax, = plot_map(nn.Flatten(), dl, vocab=vocab, method=lambda f: f)
        assert [o.get_text() for o in ax.get_legend().get_texts()]==want
        for c,o in zip((1,2,3), ax.collections):
            torch.testing.assert_close(torch.tensor(o.get_offsets()).float(), x[y==c].flatten(1))
            assert tuple(o.get_facecolor()[0])==plt.get_cmap('tab10')(c)

def test_map_colours_of_a_part():
    x,_ = on_circle(60)
    y   = torch.arange(60)%3
    ax, = plot_map(nn.Flatten(), tensor_dls((x,y), bs=6).train, n=30, method=lambda f: f)
    assert [o.get_text() for o in ax.get_legend().get_texts()]==['0','1','2'] and len(points(ax))==30
    for c,o in enumerate(ax.collections):
        assert (y[torch.cdist(torch.tensor(o.get_offsets()).float(), x.flatten(1)).argmin(1)]==c).all()

def test_map_of_torchvision_classes():
    x,_ = on_circle(6)
    ds  = torch_data.TensorDataset(x, torch.arange(6)%2)
    ds.classes = ['cat','dog']
    ax, = plot_map(nn.Flatten(), torch_data.DataLoader(ds, 6))
    assert [o.get_text() for o in ax.get_legend().get_texts()]==['cat','dog']

@pytest.mark.parametrize('y', (None, torch.rand(30), torch.rand(30,4), torch.ones(30,4).long()), ids=('none', 'numbers', 'several', 'many-hot'))
def test_map_without_classes(y):
    x = pixels()
    ax, = plot_map(nn.Flatten(), tensor_dls(x if y is None else (x,y), bs=8).train)
    assert len(ax.collections)==1 and len(points(ax))==30 and ax.get_legend() is None

def test_map_of_many_classes():
    ax, = plot_map(nn.Flatten(), tensor_dls((pixels(),torch.arange(30)), bs=8).train)
    assert len(ax.collections)==30 and len({tuple(o.get_facecolor()[0]) for o in ax.collections})==30 and ax.get_legend() is None

def test_tsne():
    "Three groups far apart stay groups, and a second map is the same"
    y = torch.arange(45)%3
    x = (torch.eye(3)[y]*.8+.05*torch.rand(45,3, generator=torch.Generator().manual_seed(0))).view(45,1,1,3)
    dl = tensor_dls((x,y), bs=16).train
    one,two = (plot_map(nn.Flatten(), dl, method='tsne')[0] for _ in range(2))
    assert torch.equal(points(one), points(two))
    p,c = points(one),y.sort().values # class by class
    near = torch.cdist(p, p).fill_diagonal_(torch.inf).argmin(1)
    assert (c[near]==c).all()
    assert len(points(plot_map(nn.Flatten(), tensor_dls(x[:5], bs=5).train, method='tsne')[0]))==5 # fewer than its usual neighbours

def test_thumbs():
    "Each image lies in the field of its point"
    x  = pixels(60, h=8, w=4)
    xy = torch.rand(60,2, generator=torch.Generator().manual_seed(0))*torch.tensor([2.,1.])
    ax, = plot_map(nn.Flatten(), tensor_dls(x, bs=16).train, method=lambda f: xy.numpy(), thumbs=4)
    s  = (xy.max(0).values-xy.min(0).values).max().item()/4
    fields = ((xy-xy.min(0).values)/s).long().clamp(max=3)
    seen = set()
    for im in ax.images:
        i, = (visible(x)[:,0]-torch.tensor(np.asarray(im.get_array()))).abs().amax((1,2)).lt(1e-5).nonzero().flatten().tolist()
        l,r,b,t = im.get_extent()
        mid = xy.min(0).values+s*(fields[i]+.5)
        torch.testing.assert_close(torch.tensor([l,r,b,t]), torch.stack([mid[0]-s/4, mid[0]+s/4, mid[1]-s/2, mid[1]+s/2]), rtol=1e-4, atol=1e-4)
        seen.add(tuple(fields[i].tolist()))
    assert len(ax.images)==len(seen)==len(set(map(tuple, fields.tolist())))
    (l,r),(b,t) = ax.get_xlim(),ax.get_ylim()
    assert l<=xy[:,0].min() and r>=xy[:,0].max() and b<=xy[:,1].min() and t>=xy[:,1].max() # no point is cut off

@pytest.mark.parametrize('method', ('pca', 'tsne'))
def test_map_of_a_collapsed_encoder(method):
    class Const(nn.Module):
        def forward(self, x): return torch.ones(len(x), 4)
    ax, = plot_map(Const(), tensor_dls(pixels(), bs=8).train, method=method, thumbs=3)
    assert len(points(ax))==30 and ax.images
    for l,r,b,t in (o.get_extent() for o in ax.images): assert r>l and t>b


# Normalisation happens once

@pytest.mark.parametrize('tfms', ([IntToFloatTensor(), Normalize.from_stats(*norm, cuda=False)], [NormalizeView(*norm)]), ids=('Normalize', 'NormalizeView'))
def test_loader_normalises_and_views_do(tfms):
    "Statistics given, or those of the views, replace the loader's; without any the loader's hold"
    x,stats = pixels(40, 1, 14, 14),([.6],[.3])
    plain,normed = tensor_dls(x, bs=8),tensor_dls(x, bs=8, after_batch=tfms)
    learn = Learner(plain, model('swav'), cbs=callback('swav', augs('swav', stats=stats)))
    raw   = lambda f: f[:,:2]
    def at(enc, dls, **kwargs): return points(plot_map(enc, dls.train, method=raw, **kwargs)[0])
    assert torch.equal(at(learn, plain), at(learn, normed))
    assert torch.equal(at(nn.Flatten(), plain, stats=stats), at(nn.Flatten(), normed, stats=stats))
    torch.testing.assert_close(at(nn.Flatten(), plain, stats=norm), at(nn.Flatten(), normed))
    assert not torch.allclose(at(nn.Flatten(), plain), at(nn.Flatten(), normed), atol=.01)
    assert not torch.allclose(at(learn, plain), at(learn.model, plain), atol=1e-4)
    for f in (lambda dls, **kw: show_neighbors(nn.Flatten(), dls.train, [1,5], k=4, **kw), lambda dls, **kw: show_neighbors(learn, dls.train, [1,5], k=4)):
        a,b = ([number(o, x) for o in f(dls, stats=stats)] for dls in (plain, normed))
        assert a==b
    a,b = (plot_codes(learn, dls.train)[0].patches[0].get_data().values for dls in (plain, normed))
    assert (a==b).all()


# Nothing is left behind

@pytest.mark.parametrize('name', ('swav', 'simclr'))
def test_no_trace(name):
    dls   = tensor_dls((pixels(40, 1, 14, 14),torch.arange(40)%2), bs=8)
    learn = Learner(dls, model(name), cbs=callback(name))
    learn.model.train(); next(iter(learn.model.encoder.children())).eval()
    def state():
        return (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dls.train.rng.getstate(), dls.train.shuffle,
                [o.training for o in learn.model.modules()], [o.device for o in learn.model.parameters()], {k:v.tolist() for k,v in learn.model.state_dict().items()},
                torch.backends.cudnn.deterministic, torch.is_grad_enabled(), [o.grad for o in learn.model.parameters()])
    set_seed(7)
    before = state()
    plot_map(learn, method='tsne', thumbs=2)
    show_neighbors(learn, dls, [1])
    if name=='swav': show_prototypes(learn); plot_codes(learn)
    show_neighbors(learn, torch_dl(pixels(40, 1, 14, 14), shuffle=True), [1])
    assert state()==before
    with pytest.raises(ValueError, match='from 0 to 39'): show_neighbors(learn, dls, [40])
    assert state()==before


# What goes wrong, and what it says

def test_messages():
    x,_ = lit_images()
    dl  = tensor_dls(x, bs=4).train
    for f in (show_prototypes, plot_codes):
        with pytest.raises(ValueError, match=r'the model \(Flatten\) has no `prototypes`.*create_swav_model.*plot_map and show_neighbors'): f(nn.Flatten(), dl)
        with pytest.raises(TypeError, match='dl is missing.*pass a DataLoader'): f(lit_model())
        with pytest.raises(ValueError, match='DataLoader is empty'): f(lit_model(), [])
    learn = Learner(tensor_dls(pixels(40,1,14,14), bs=8), model('simclr'), cbs=callback('simclr'))
    with pytest.raises(ValueError, match='SimCLRModel.*no `prototypes`'): show_prototypes(learn)
    with pytest.raises(TypeError, match='dl is missing'): plot_map(nn.Flatten())
    with pytest.raises(ValueError, match="method='umap' must be 'pca', 'tsne', or a function"): plot_map(nn.Flatten(), dl, method='umap')
    for ids in (18, [0,-1], []):
        with pytest.raises(ValueError, match=r'ids=\[.*from 0 to 17'): show_neighbors(nn.Flatten(), dl, ids)
    with pytest.raises(ValueError, match='k=18 neighbours of 17 images: k must be from 1 to 17'): show_neighbors(nn.Flatten(), dl, 0, k=18)
    with pytest.raises(ValueError, match='k=0'): show_neighbors(nn.Flatten(), dl, 0, k=0)
