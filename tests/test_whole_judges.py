"Everything that judges an encoder, on images of their own heights and widths: the middle of each, in the order of the dataset"
from fractions import Fraction

import numpy as np, pytest, torch, torch.utils.data as td
import torchvision.transforms.v2.functional as tvf
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.transforms import parent_label
from fastai.learner import Learner
from fastai.metrics import ValueMetric
from fastai.torch_core import set_seed
from fasttransform import Pipeline
from fastcore.basics import noop
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn
from torch.nn import functional as F

import self_supervised.pixels as pixels
from self_supervised.augmentations import RandomCropResize, get_batch_augs, get_fastai_batch_augs, get_kornia_batch_augs, get_torchvision_batch_augs
from self_supervised.data import image_dls, tensor_dls
from self_supervised.evaluation import OnlineKNN, OnlineProbe, compare, evaluate, extract_features, fine_tune, knn, linear_probe, sgd_probe
from self_supervised.features import crop_size, in_order
from self_supervised.modules import SimCLRModule, SwAVModule
from self_supervised.packed import pack_images, packed_batch
from self_supervised.pictures import plot_codes, plot_map, show_neighbors, show_prototypes
from self_supervised.pixels import center_crop
from self_supervised.vision.metrics import KNNProxyMetric

from methods import augs, callback, encoder, learner, methods, model, plain, quiet

sizes = [(40,60), (60,40), (48,48), (37,101), (30,160), (150,30), (33,50), (64,49), (41,41), (90,45), (45,77), (70,39)] # the fifth and the sixth are longer than 3:1

def drawing(i, h, w):
    "Number `i`: waves of the colour of its class, in its own direction, and a dark spot that is nowhere in the middle"
    y,x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing='ij')
    wave = .5+.3*torch.sin(3*(x*(i%5+1)+y*(i%3+1))+i)
    im   = wave*torch.tensor([[.9,.5,.2],[.2,.6,.9]])[i%2,:,None,None] + .1*x
    im[:,:h//8,:w//8] = i/40
    return (255*im.clamp(0, 1)).round().to(torch.uint8)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('drawings')
    for i,hw in enumerate(sizes):
        (path/str(i%2)).mkdir(exist_ok=True)
        Image.fromarray(drawing(i, *hw).permute(1,2,0).numpy()).save(path/str(i%2)/f'{i:02}.png')
    return path

def number(fn): return int(fn.stem)
def dls_of(folder, **kwargs): return image_dls(folder, parent_label, **{'bs':5, 'device':'cpu', 'num_workers':0, **kwargs})
def halves(folder, **kwargs):
    fns = sorted(folder.rglob('*.png'), key=number)
    return dls_of(fns[:8], valid=fns[8:], **kwargs)

def middle(i, max_aspect=3):
    "What a validation loader gives of drawing `i`"
    x = drawing(i, *sizes[i])
    h,w = x.shape[1:]
    n = round(max_aspect*min(h, w))
    if w>n: return x[...,(w-n)//2:][...,:n]
    return x[:,(h-n)//2:][:,:n] if h>n else x

def by_hand(x, h, w):
    "The middle of an image through torchvision; the box in whole numbers"
    H,W = x.shape[1:]
    s = min(Fraction(H, h), Fraction(W, w))*Fraction(7, 8)
    bh,bw = round(s*h),round(s*w)
    return tvf.resized_crop(x/255, (H-bh)//2, (W-bw)//2, bh, bw, [h,w], antialias=True)

shown = set() # shapes of images that encoders saw
class Shapes(nn.Sequential):
    def forward(self, x):
        shown.add(tuple(x.shape[1:]))
        return super().forward(x)

def shapes(): return Shapes(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48,12))
def simclr(dls, enc=None, **kwargs): return learner('simclr', dls, model('simclr', 3, shapes() if enc is None else enc, n_features=12), callback('simclr', augs('simclr', 24)), **kwargs)


# The middle

@pytest.mark.parametrize('size', [24, (16,32), 224])
@pytest.mark.parametrize('device', ['one by one', 'at once'])
def test_center_crop(size, device, monkeypatch):
    if device=='at once': monkeypatch.setattr(pixels, 'one_by_one', lambda x: False)
    xs = [drawing(i, *o) for i,o in enumerate([*sizes, (1,1), (1,9), (7,2)])]
    v  = center_crop(pack_images(xs), size)
    hw = (size,size) if isinstance(size, int) else size
    assert v.shape==(len(xs),3,*hw) and v.dtype==torch.float32 and type(v) is torch.Tensor
    for a,x in zip(v, xs):
        if min(x.shape[1:])>1: assert (a-by_hand(x, *hw)).abs().max() < 1.5/255 # bytes are rounded after each of two passes
    assert torch.allclose(center_crop(pack_images([o/255 for o in xs]), size), v, atol=1.5/255)
    assert torch.allclose(center_crop(xs[0][None], size), v[:1], atol=1e-5)

def test_center_crop_is_the_protocol_of_papers():
    "Where 256 divides the shorter side nothing is rounded, and but for the rim it is torchvision's; elsewhere the picture is moved by about a pixel of the result"
    def both(x): return center_crop(pack_images([x]), 224)[0],tvf.center_crop(tvf.resize(x, 256, antialias=True), 224)
    a,b = both(torch.rand(3,512,768, generator=torch.Generator().manual_seed(0)))
    assert (a-b)[:,1:-1,1:-1].abs().max()<1e-5
    for h,w in [(375,500), (500,375), (300,871), (949,741), (281,260)]:
        at  = torch.stack([torch.arange(h)[:,None].expand(h,w), torch.arange(w).expand(h,w)]).double() # where a pixel was
        a,b = both(at)
        assert ((a-b)[:,2:-2,2:-2].abs()/max(1, min(h,w)/256)).max()<1.5

def test_squares_go_through_the_same():
    x = (255*torch.rand(3,3,64,64)).to(torch.uint8)
    assert torch.equal(extract_features(nn.Flatten(), [(x,)], size=56)[0], (x[...,4:60,4:60]/255).flatten(1))
    assert torch.equal(extract_features(nn.Flatten(), [(x,)])[0], (x/255).flatten(1))


# Features

@pytest.mark.parametrize('num_workers', [0, 2])
def test_features_in_order(folder, num_workers):
    "A shuffled training loader, a validation loader, PyTorch's and a list of batches give the middle of each image, in the order of their dataset, with its label"
    dls = dls_of(folder, num_workers=num_workers)
    fns = list(dls.train.items)
    f,y = extract_features(nn.Flatten(), dls.train, size=24)
    assert len(f)==len(sizes)
    for row,label,fn in zip(f, y, fns):
        assert (row.view(3,24,24)-by_hand(middle(number(fn)), 24, 24)).abs().max()<1.5/255
        assert dls.vocab[label]==fn.parent.name
    assert torch.equal(extract_features(nn.Flatten(), dls.train, size=24)[0], f) # no window of a panorama is drawn
    if num_workers: return
    valid = image_dls([fns[0]], bs=1, valid=fns[1:], device='cpu', num_workers=0).valid
    assert list(valid.items)==fns[1:] and torch.equal(extract_features(nn.Flatten(), valid, size=24)[0], f[1:])
    xs = [middle(number(o)) for o in fns]
    for dl in (td.DataLoader(list(zip(xs, y)), 5, shuffle=True, collate_fn=packed_batch), [(pack_images(xs[:7]), y[:7]), (pack_images(xs[7:]), y[7:])]):
        a,b = extract_features(nn.Flatten(), dl, size=24)
        assert torch.equal(a, f) and torch.equal(b, y)

def test_training_windows_are_the_middle_in_order(folder):
    "The loader that is judged takes the middle of panoramas, also where it is the training loader, and is as before afterwards"
    dls = dls_of(folder, shuffle=False, drop_last=False)
    def seen(dl): return [x for b in dl for x in b[0].images]
    with in_order(dls.train) as dl:
        for x,fn in zip(seen(dl), dls.train.items): assert torch.equal(x, middle(number(fn)))
    i = [number(o) for o in dls.train.items].index(4)
    assert len({seen(dls.train)[i].sum().item() for _ in range(4)})>1

def test_size_is_that_of_the_largest_view(folder):
    dls   = halves(folder)
    learn = simclr(dls)
    shown.clear()
    before = torch.get_rng_state()
    f,_ = extract_features(learn, dls.train)
    assert torch.equal(torch.get_rng_state(), before) and shown=={(3,24,24)}
    assert torch.equal(f, extract_features(learn.model, dls.train, size=24)[0])
    assert not torch.equal(f, extract_features(learn, dls.train, size=20)[0])
    for judge in (extract_features, lambda m, dl: knn(m, dls), lambda m, dl: sgd_probe(m, dls, epochs=1)):
        with pytest.raises(ValueError, match=r'heights and widths of their own.*pass size=224.*image_dls\(…, size=256\)'): judge(learn.model.encoder, dls.train)
    learn.remove_cb(learn.sim_clr)
    with pytest.raises(ValueError, match='pass size=224'): extract_features(learn, dls.train)
    with pytest.raises(ValueError, match='size=0 must be positive'): extract_features(learn, dls.train, size=0)

def _own(size): return Pipeline([RandomCropResize(size)], split_idx=0)
@pytest.mark.parametrize('get', [get_batch_augs, get_torchvision_batch_augs, get_kornia_batch_augs, get_fastai_batch_augs, _own], ids=['ours', 'torchvision', 'kornia', 'fastai', 'own'])
def test_size_of_any_pipeline(get):
    if get is get_kornia_batch_augs: pytest.importorskip('kornia')
    x = pack_images([drawing(i, *o) for i,o in enumerate(sizes[:3])])
    for order in (1,-1):
        learn = simclr(tensor_dls(torch.rand(8,3,24,24), bs=4))
        learn.sim_clr.aug_pipelines = [get(o) for o in (12,(20,28),16)][::order]
        assert crop_size(learn, x)==(20,28)

@pytest.mark.parametrize('c', [1, 5])
def test_channels_and_floats(c):
    "Grey images and many bands, as floats"
    xs = [torch.rand(c,*o) for o in sizes[:4]]
    f,_ = extract_features(nn.Flatten(), [pack_images(xs)], stats=([.4]*c,[.2]*c), size=(16,24))
    want = torch.stack([by_hand(255*o, 16, 24) for o in xs])
    assert torch.allclose(f, ((want-.4)/.2).flatten(1), atol=1e-4)
    with pytest.raises(ValueError, match='divide them by 255'): extract_features(nn.Flatten(), [pack_images([255*o for o in xs])], stats=([.4]*c,[.2]*c), size=16)


# Questions

def test_questions(folder):
    "Each is the same as of squares that were cut by hand"
    dls   = halves(folder)
    hand  = [(torch.stack([by_hand(middle(number(o)), 24, 24) for o in dl.items]), torch.tensor([int(o.parent.name) for o in dl.items])) for dl in dls.loaders]
    squares,learn = tensor_dls(*hand, bs=4),simclr(dls)
    cut = simclr(squares, learn.model.encoder)
    for ask in (lambda m,d: knn(m, d, k=3), linear_probe, lambda m,d: evaluate(m, d, k=3, n_per_class=2, seeds=2)):
        a,b = ([r.runs for r in (res if isinstance(res, list) else [res])] for res in (ask(learn, dls), ask(cut, squares)))
        assert a==b
    assert 'k-NN(3)' in str(compare({'whole':learn}, dls, k=3, n_per_class=None))
    assert knn(learn.model, dls, k=3, size=24).settings['size']==24

@pytest.mark.parametrize('ask', [lambda m,d,**kw: sgd_probe(m, d, epochs=2, bs=4, **kw), lambda m,d,**kw: fine_tune(m, d, n_per_class=2, epochs=2, bs=4, **kw)], ids=['sgd_probe', 'fine_tune'])
def test_protocols(folder, ask, monkeypatch):
    "Training sees random crops of whole images, judging their middle, both as large as the largest view or `size`"
    seen,crop = [],RandomCropResize.params
    monkeypatch.setattr(RandomCropResize, 'params', lambda self,shape,device=None: (seen.append((shape[2:], crop(self, shape, device))), seen[-1][1])[1])
    dls = halves(folder)
    learn = simclr(dls)
    for m,kw in ((learn, {}), (learn.model.encoder, dict(size=24))):
        seen.clear()
        shown.clear()
        r = ask(m, dls, **kw)
        assert tuple(r.settings['size'])==(24,24) if not kw else r.settings['size']==24
        train = [o for o in seen if len(o[1])>1]
        assert train and all(isinstance(h, torch.Tensor) for (h,w),_ in train) and {*torch.cat([h for (h,w),_ in train]).tolist()} <= {h for h,_ in sizes}
        assert shown=={(3,24,24)}
    with pytest.raises(ValueError, match='resize_scale=None.*heights and widths of their own'): ask(learn, dls, resize_scale=None)

def test_one_loader_of_squares(folder):
    "Squares to train on and whole images to be judged on, and the other way round: each as it is, in views as large"
    whole,sq = halves(folder),halves(folder, size=28)
    m = shapes()
    r = sgd_probe(m, DataLoaders(sq.train, whole.valid), epochs=1, bs=4, size=24)
    assert r.settings['test']==4
    r = sgd_probe(m, DataLoaders(whole.train, sq.valid), epochs=1, bs=4, size=24)
    assert r.settings['test']==4
    assert sgd_probe(m, DataLoaders(sq.train, whole.valid), epochs=1, bs=4).settings['size'] is None
    with pytest.raises(ValueError, match='pass size=224'): sgd_probe(m, DataLoaders(whole.train, sq.valid), epochs=1, bs=4)


# While it trains

class Draws(Callback):
    "Numbers that a run draws"
    order = 90
    def before_fit(self): self.seen = []
    def after_epoch(self): self.seen.append(torch.rand(1).item())

@pytest.mark.parametrize('online,ask', [(lambda d: OnlineKNN(d, k=3), lambda l,d: knn(l, d, k=3)), (OnlineProbe, linear_probe)], ids=['OnlineKNN', 'OnlineProbe'])
def test_online(folder, online, ask):
    "The number of the table is the answer to the question, and nothing of it is felt by the run"
    ends = []
    for with_it in (True, False):
        set_seed(0)
        dls   = halves(folder, seed=0)
        learn = simclr(dls, cbs=[draws:=Draws(), *([cb:=online(dls)] if with_it else [])])
        quiet(learn, 2, 1e-2)
        if with_it: assert cb.history[-1][1]==float(ask(learn, dls))
        ends.append([*learn.model.state_dict().values(), torch.tensor(draws.seen)])
    assert all(torch.equal(*o) for o in zip(*ends))

def test_knn_proxy_metric(folder):
    dls    = halves(folder)
    metric = KNNProxyMetric()
    learn  = simclr(dls, cbs=metric, metrics=ValueMetric(metric.accuracy, 'knn_accuracy'))
    quiet(learn, 1)
    assert learn.recorder.values[-1][-1]==pytest.approx(knn(extract_features(learn, dls.valid), k=1).accuracy)


# Pictures

@pytest.fixture
def figures():
    yield
    plt.close('all')

def test_neighbors(folder, figures):
    "Images are drawn whole, and neighbours are those of their middles"
    dls   = dls_of(folder)
    names = [number(o) for o in dls.train.items]
    f = F.normalize(torch.stack([by_hand(middle(i), 24, 24).flatten() for i in names]), dim=1)
    near = (f@f.T).fill_diagonal_(-1).topk(3).indices
    def drawn(ax): return torch.as_tensor(np.asarray(ax.images[0].get_array()))
    axes = show_neighbors(nn.Flatten(), dls.train, [2,7], k=3, size=24)
    for ax,i in zip(axes, [2,*near[2].tolist(),7,*near[7].tolist()]): assert torch.allclose(drawn(ax).permute(2,0,1), middle(names[i])/255, atol=1e-6)

def test_large_images_become_thumbnails(figures):
    x  = [drawing(i, 300, 600) for i in range(4)]
    ax = show_neighbors(nn.Flatten(), [pack_images(x)], 1, k=1, size=16)[0]
    got = np.asarray(ax.images[0].get_array())
    assert got.shape==(128,256,3)
    assert np.abs(got-(tvf.resize(x[1]/255, [128,256], antialias=True)).permute(1,2,0).numpy()).max()<1e-5

@pytest.mark.parametrize('name', ['swav', 'deepcluster', 'sela'])
def test_pictures(folder, figures, name):
    dls   = dls_of(folder)
    learn = learner(name, dls, model(name, 3), callback(name, augs(name, 24)))
    assert len(show_prototypes(learn, dls.train, n=2, k=2))>=2
    plot_codes(learn, dls.train)
    ax, = plot_map(learn, dls.train, thumbs=3)
    assert ax.images and {o.get_array().shape for o in ax.images} <= {(*middle(i).shape[1:],3) for i in range(len(sizes))}
    for f in (show_prototypes, plot_codes):
        with pytest.raises(ValueError, match='pass size=224'): f(learn.model, dls.train)
        f(learn.model, dls.train, size=24)


# Memory of all images

class Colour(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(1))
    def forward(self, x): return self.w*x.mean((2,3))

@pytest.mark.parametrize('name', ['deepcluster', 'sela'])
def test_row_i_is_image_i(name):
    "The memory pass, and batches that write into the memory, at crops of images of one colour each"
    colours = F.normalize(torch.rand(22,3, generator=torch.Generator().manual_seed(0))+.1, dim=1)
    ds   = [((o*255).round()[:,None,None].expand(3,*sizes[i%12]).to(torch.uint8),) for i,o in enumerate(colours)]
    dl   = DataLoaders.from_dsets(ds, ds[:4], bs=5, device='cpu', num_workers=0, create_batch=packed_batch)
    of   = methods[name]
    m    = of.create_model(Colour(), 8, 3, n_protos=4, n_features=3, n_heads=2)
    m.projector = nn.Identity()
    seen = []
    class Look(Callback):
        order = 80
        def after_loss(self): seen.append(cb.memory.clone())
    cb   = of.callback(of.get_aug_pipelines(num_crops=(2,), crop_sizes=(16,), min_scales=(.1,), max_scales=(1.,), **plain))
    quiet(Learner(dl, m, cbs=[cb, Look()], loss_func=noop), 2, 0.)
    assert len(seen)>=8
    for memory in (seen[0], cb.memory):
        assert memory.shape==(2,22,3)
        for z in memory: assert torch.allclose(z, colours, atol=.01)


# Without fastai's loop

@pytest.mark.parametrize('cls', [SwAVModule, SimCLRModule])
def test_modules_say_what_to_pass(cls):
    x = pack_images([drawing(i, *o) for i,o in enumerate(sizes[:4])])
    m = cls(encoder(3), (16,8), **(dict(n_prototypes=8) if cls is SwAVModule else {}))
    for kw in (dict(images=x), dict(view1=x, view2=x), dict(global_views=[x,x])):
        with pytest.raises(ValueError, match=r'heights and widths of their own.*make_views.*center_crop\(x, 224\)'): m(**kw)
    assert m(images=center_crop(x, 24)).embedding.shape==(4,8)
    assert torch.equal(extract_features(m, [x], size=24)[0], m.eval()(images=center_crop(x, 24)).embedding)
