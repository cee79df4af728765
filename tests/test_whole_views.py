"""Views of images of their own sizes: boxes and pixels are those that torchvision draws in, and cuts from, each image by itself"""
import gc, pickle, warnings, weakref
from contextlib import nullcontext

import pytest, torch
import torchvision.transforms as T, torchvision.transforms.v2.functional as tvf
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.all import Pipeline
from scipy.stats import ks_2samp
from torch import nn, tensor
from torch.nn import functional as F

from self_supervised import pixels, views as views_module
from self_supervised.augmentations import *
from self_supervised.packed import pack_images
from self_supervised.pipelines import make_views
from self_supervised.sinkhorn import sinkhorn_knopp
from self_supervised.vision.swav import create_swav_model, get_swav_aug_pipelines, swav_loss
from self_supervised.whole_images import WholeImageDL

from test_waiting import NoWaiting

tol    = 2/255 # two gray levels
sizes  = [(1,1), (1,8), (8,1), (50,1), (2,3), (3,3), (30,30), (64,64),
          *(hw for s in (8,20,31,48) for a in (4/3,2,4,8) for hw in ((s,round(s*a)), (round(s*a),s)))]
narrow = [o for o in sizes if max(o)>=2*min(o)]
few    = [(40,54), (54,40), (20,160), (96,12), (9,9)]
plain  = dict(jitter=False, bw=False, blur=False, stats=None, flip_p=0.)
rgb    = ([.4,.5,.6], [.2,.3,.25])

def photo(h, w, seed=0, c=3):
    "(c,h,w) uint8: smooth colours, and noise"
    g = torch.Generator().manual_seed(1000*h+w+seed)
    x = F.interpolate(torch.rand(1,c,4,5, generator=g), (h,w), mode='bilinear')[0]
    return ((.7*x + .3*torch.rand(c,h,w, generator=g))*255).round().byte()

def photos(sizes=few, **kwargs): return [photo(*o, **kwargs) for o in sizes]
def diff(a, b): return (a-b).abs()
def seeded(f, *args):
    set_seed(7)
    return f(*args)

@pytest.fixture
def one_by_one(monkeypatch):
    "Choose the engine: that of a CPU, or that of other devices"
    def _choose(each):
        for m in (pixels, views_module): monkeypatch.setattr(m, 'one_by_one', lambda x: each)
    return _choose

backends = dict(cpu=(get_batch_augs, True), device=(get_batch_augs, False), torchvision=(get_torchvision_batch_augs, True),
                kornia=(get_kornia_batch_augs, True), fastai=(get_fastai_batch_augs, True))

@pytest.fixture(params=backends)
def build(request, one_by_one):
    "A builder of pipelines, with the engine chosen"
    f,each = backends[request.param]
    one_by_one(each)
    return f

# ---- boxes, read off images that hold their own coordinates

def ramps(sizes): return pack_images([torch.stack([((torch.arange(w)+.5)/w).expand(h,w), ((torch.arange(h)+.5)/h)[:,None].expand(h,w)]) for h,w in sizes])

def boxes_in(views, sizes):
    "Views (B,2,8,8) of `ramps` → (B,4) top, left, height, width: pixels 2 and 5 of a view come from 5/16 and 11/16 of its box"
    res,sizes = [],tensor(sizes)
    for at,full in ((views[:,1].mean(2), sizes[:,0]), (views[:,0].mean(1), sizes[:,1])):
        a,b = (at[:,[2,5]].double()*full[:,None]).T
        n = ((b-a)*8/3).round().clamp(min=1)
        res.append((((a+b-n)/2).round(), n))
    return torch.stack([res[0][0], res[1][0], res[0][1], res[1][1]], 1).long()

def test_boxes_can_be_read_off():
    boxes = tensor([T.RandomResizedCrop.get_params(torch.empty(1,*o), (.05,1.), (.5,2.)) for o in sizes for _ in range(5)])
    x = ramps([o for o in sizes for _ in range(5)])
    views = torch.stack([tvf.resized_crop(o, *b, size=(8,8), antialias=True) for o,b in zip(x.images, boxes.tolist())])
    assert boxes_in(views, [o for o in sizes for _ in range(5)]).equal(boxes)

scale = (.1,.9)

@pytest.fixture(scope='module')
def theirs():
    "(40,400,4) boxes of torchvision, for each size"
    set_seed(3)
    return tensor([[T.RandomResizedCrop.get_params(torch.empty(1,*o), scale, (3/4,4/3)) for _ in range(400)] for o in sizes])

def properties(boxes):
    "(40,n,4) boxes → (40,n) each"
    t,l,h,w = boxes.double().unbind(2)
    H,W = tensor(sizes).double().T[...,None]
    return dict(area=h*w/(H*W), aspect=(w/h).log(), row=t/(H-h).clamp(min=1), col=l/(W-w).clamp(min=1), bottom=(t+h)/H, right=(l+w)/W)

def test_boxes_are_those_of_torchvision(build, theirs):
    "Size by size, and all of them together"
    x,pipe,n = ramps(sizes),build(8, **plain, resize_scale=scale),120
    ours = torch.stack([boxes_in(v, sizes) for _ in range(n//10) for v in pipe.views(x, 10)], 1)
    (t,l,h,w),(H,W) = ours.unbind(2),tensor(sizes).T[...,None]
    assert ours.shape==(40,n,4) and (t>=0).all() and (l>=0).all() and (h>0).all() and (w>0).all() and (t+h<=H).all() and (l+w<=W).all()
    a,b = properties(ours),properties(theirs)
    for k in a:
        for p,q,hw in zip(a[k], b[k], sizes): assert ks_2samp(p, q, method='asymp').pvalue>1e-5, (k, hw)
        assert ks_2samp(a[k].flatten(), b[k].flatten(), method='asymp').pvalue>1e-3, k

def test_box_of_an_image_that_is_too_narrow(build):
    "The largest centred one, as torchvision has it"
    want = tensor([T.RandomResizedCrop.get_params(torch.empty(1,*o), (1.,1.), (3/4,4/3)) for o in narrow])
    pipe = build(8, **plain, resize_scale=(1.,1.))
    for _ in range(3): assert boxes_in(pipe(ramps(narrow)), narrow).equal(want)

def test_one_box_for_a_batch_is_one_part_of_each_image(build):
    hw = [(24,32), (64,48), (30,200), (40,40), (160,20)]
    full,pipe,seen = tensor(hw).double(),build(8, **plain, resize_scale=(.2,.8), same_on_batch=True),[]
    for _ in range(20):
        at,part = boxes_in(pipe(ramps(hw)), hw).double().split(2, 1)
        share,room = part/full,full-part
        for i in range(1, len(hw)): # whole pixels: half a one of each image at most
            assert (diff(share[i], share[0]) <= .5/full[i]+.5/full[0]+1e-9).all()
            ok = (room[[0,i]]>0).all(0)
            assert (diff(at[i]/room[i], at[0]/room[0]) <= .5/room[i]+.5/room[0]+1e-9)[ok].all()
        seen.append(share[0])
    assert len(torch.stack(seen).unique(dim=0))>10 # and another for the next batch

# ---- pixels

@pytest.mark.parametrize('size', [(16,16), (12,40)])
@pytest.mark.parametrize('each', [True,False])
def test_pixels_are_those_of_torchvision_on_the_original(each, size, one_by_one):
    "Two boxes of each image; floats agree to rounding"
    one_by_one(each)
    x = photos(sizes)
    for k in range(2):
        boxes = tensor([T.RandomResizedCrop.get_params(torch.empty(1,*o), (.08,1.), (3/4,4/3)) for o in sizes])
        want  = torch.stack([tvf.resized_crop(o/255, *b, size=size, antialias=True) for o,b in zip(x, boxes.tolist())])
        bytes = torch.stack([tvf.resized_crop(o, *b, size=size, antialias=True) for o,b in zip(x, boxes.tolist())])/255
        v = crop_resize(pack_images(x), boxes, size)
        assert v.dtype==torch.float32 and type(v) is torch.Tensor
        assert diff(v, want).max()<=tol and diff(v, bytes).max()<=tol
        assert diff(crop_resize(pack_images([o/255 for o in x]), boxes, size), want).max()<1e-5

def test_nothing_is_blown_up_that_the_image_could_fill(build):
    "Lines of one pixel on an image of 200 stay sharp in a view of 20 pixels of a tenth of it"
    x = (torch.arange(200)%2).expand(3,100,200).float()
    v = build(20, **plain, resize_scale=(.02,.02), resize_ratio=(1.,1.))(pack_images([x, x.mT]))
    assert diff(v[0,:,:,1:], v[0,:,:,:-1]).min()>.99 and diff(v[1,:,1:], v[1,:,:-1]).min()>.99

settings = dict(all={}, rotated=dict(rotate=True, rotate_p=.5), gray=dict(bw_p=1.), solarized=dict(solarize=True, solarize_p=.5), normalised=dict(stats=rgb), one=dict(same_on_batch=True, blur_s=1.2),
                exact=dict(exact_hue=True), every=dict(rotate=True, rotate_p=1., jitter_p=1., blur_p=1., flip_p=1., bw_p=.5, stats=rgb), sharp=dict(blur=False))

@pytest.mark.parametrize('size,c', [((13,29),3), (24,1), (16,5)])
@pytest.mark.parametrize('kw', settings.values(), ids=settings)
def test_all_at_once_is_one_by_one(kw, size, c, one_by_one):
    "Views of one block, whose kernel is as wide as the largest sigma wants, or with one sigma"
    kw = {'stats':None, 'blur_p':.8, **kw, **(dict(stats=None) if c!=3 else {})}
    x,pipe = pack_images([o/255 for o in photos([*few, *sizes[::3]], c=c)]),get_batch_augs(size, **kw)
    res = []
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'images with')
        for each in (True,False):
            one_by_one(each)
            res.append(seeded(pipe.views, x, 3))
    for a,b in zip(*res):
        assert a.shape==b.shape and a.dtype==b.dtype==torch.float32
        d = diff(pipe.decode(a), pipe.decode(b))
        assert d.max()<1e-4 or kw.get('solarize') and (d>1e-4).float().mean()<1e-3 # which jumps, at its threshold

@pytest.mark.parametrize('each', [True,False])
def test_together_is_step_by_step(each, one_by_one):
    one_by_one(each)
    x = pack_images([(o*.2+90).byte() for o in photos()]*6) # nothing to clamp
    pipe = get_batch_augs(24, rotate=True, jitter_s=.4, stats=rgb, blur_s=1.2)
    a,b = seeded(pipe, x),seeded(Pipeline.__call__, pipe, x)
    assert diff(pipe.decode(a), pipe.decode(b)).max()<=tol

# ---- a device is never waited for

@pytest.mark.parametrize('kw,dtype', [({}, torch.uint8), ({}, torch.float), (dict(exact_hue=True), torch.uint8), (dict(rotate=True, solarize=True), torch.uint8),
                                      (dict(same_on_batch=True), torch.float), (dict(stats=None, blur=False), torch.uint8)], ids=repr)
def test_a_device_is_never_waited_for(kw, dtype, monkeypatch):
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext()) # which knows no device `meta`
    x = pack_images([o.to(dtype) for o in photos()]).to('meta')
    pipes = get_multi_aug_pipelines(2, 32, **kw) + get_multi_aug_pipelines(3, (12,16), **kw)
    make_views(pipes, x) # the first time, statistics move to the device
    with NoWaiting(): views = make_views(pipes, x)
    assert [(v.shape[2:], v.device.type, v.dtype) for v in views] == [((32,32),'meta',torch.float)]*2 + [((12,16),'meta',torch.float)]*3


# ---- the ends of a strip

red,green = tensor([1.,0,0]),tensor([0,1.,0])
def strips(n, mark, long=128, short=16):
    "Gray strips of 8:1, every other one upright, with a red mark at one end and a green one at the other"
    res = []
    for i in range(n):
        x = torch.full((3,short,long), .4) + .1*torch.rand(1,short,long)
        x[:,:,:mark],x[:,:,-mark:] = red[:,None,None],green[:,None,None]
        res.append(TensorImage(((x.mT if i%2 else x)*255).byte()))
    return res

def sees(views, color): return any((diff(v, color[:,None,None]).amax(1)<.25).any() for v in views)
def small_crops(): return get_swav_aug_pipelines((2,6), (24,12), jitter=False, bw=False, blur=False, stats=None)

@pytest.mark.parametrize('each', [True,False])
def test_both_ends_of_strips_are_seen(each, one_by_one):
    one_by_one(each)
    pipes,items = small_crops(),strips(36, 8)
    for _ in range(3):
        views = [v for i in range(0, 36, 12) for v in make_views(pipes, pack_images(items[i:i+12]))]
        assert sees(views, red) and sees(views, green)

@pytest.mark.parametrize('n', [0,2])
def test_both_ends_are_seen_through_the_windows_of_a_loader(n):
    pipes = small_crops()
    dl = WholeImageDL([(o,) for o in strips(60, 12)], bs=20, shuffle=True, num_workers=n)
    for _ in range(2):
        views = [v for x, in dl for v in make_views(pipes, x)]
        assert len(views)==3*8 and sees(views, red) and sees(views, green)

# ---- a batch of several sizes is the batches of each size

@pytest.mark.parametrize('form', [pack_images, torch.stack], ids=['packed','tensor'])
@pytest.mark.parametrize('each', [True,False])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float])
def test_mixed_sizes_are_the_batches_of_each_size(dtype, each, form, one_by_one, monkeypatch):
    "With the draws of the one: views, then loss and gradient of SwAV, the losses joined by how many images they are of. One sigma, as a kernel is as wide as the largest of its block"
    one_by_one(each)
    hw  = [(40,54), (54,40), (20,160), (40,54), (20,160), (40,54), (9,9)]
    x   = [photo(*o, seed=i) for i,o in enumerate(hw)]
    x   = [o/255 for o in x] if dtype==torch.float else x
    ids = [[i for i,o in enumerate(hw) if o==k] for k in dict.fromkeys(hw)]
    drawn,draw,part = {},views_module._draw,None
    def _draw(x, n, s):
        if part is None: drawn[s.crop.size] = draw(x, n, s)
        rows = torch.arange(n) if part is None else tensor([v*len(hw)+i for v in range(n//len(part)) for i in part])
        return type(drawn[s.crop.size])({k:tuple(p[rows] for p in o) if isinstance(o, tuple) else o[rows] for k,o in drawn[s.crop.size].items()})
    monkeypatch.setattr(views_module, '_draw', _draw)
    pipes = get_swav_aug_pipelines((2,3), (24,12), rotate=True, blur_s=1.2)
    together = make_views(pipes, pack_images(x))
    alone = []
    for part in ids: alone.append(make_views(pipes, form([x[i] for i in part])))
    for v,*vs in zip(together, *alone):
        for p,o in zip(ids, vs): assert diff(o, v[p]).max()<1e-5

    encoder = nn.Sequential(nn.Conv2d(3,4,3,2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = create_swav_model(encoder, 8, 6, n_protos=5, bn=False).double()
    def _scores(views): return model([v.double() for v in views])[1].view(len(views), -1, 5)
    def _grad(loss): return loss,torch.autograd.grad(loss, list(model.parameters()))
    scores = _scores(together)
    codes  = torch.stack([sinkhorn_knopp(o.detach()) for o in scores[:2]])
    loss,grads = _grad(swav_loss(scores, codes))
    l,gs = _grad(sum(swav_loss(_scores(o), codes[:,p])*len(p)/len(hw) for o,p in zip(alone, ids)))
    assert grads[0].abs().max()>1e-4
    torch.testing.assert_close(l, loss, atol=1e-6, rtol=1e-6)
    for a,b in zip(gs, grads): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)

# ---- every builder

full = dict(rotate=True, rotate_p=.5, jitter_p=.5, bw_p=.5, flip_p=.5, blur_p=.5, blur_s=(.1,1.))

@pytest.mark.parametrize('c', [1,3,5])
def test_channels_types_and_sizes(build, c):
    for dtype in (torch.uint8, torch.float, torch.float16, torch.float64):
        x = pack_images([o if dtype==torch.uint8 else (o/255).to(dtype) for o in photos([*few, (1,1), (1,30)], c=c)])
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'images with')
            views = build((12,20), stats=None, **full).views(x, 2)
        for v in views:
            assert type(v) is torch.Tensor and v.dtype in (torch.float32, dtype) and v.shape==(7,c,12,20)
            assert v.isfinite().all() and v.min()>=-1e-4 and v.max()<=1+1e-4

@pytest.mark.parametrize('kw', [{}, dict(same_on_batch=True)], ids=repr)
def test_one_image_and_one_pixel(build, kw):
    for o in ((1,1), (1,9), (30,40)):
        for _ in range(3):
            v = build(16, **full, **kw)(pack_images([photo(*o)]))
            assert v.shape==(1,3,16,16) and v.isfinite().all()
    dot = photo(1, 1)
    assert diff(build(8, **plain)(pack_images([dot])), (dot/255).expand(1,3,8,8)).max()<1e-5

def test_types_give_the_same_views(build):
    x = photos()
    kw = {**plain, 'flip_p':.5}
    want = seeded(build(16, **kw), pack_images([o/255 for o in x]))
    assert diff(seeded(build(16, **kw), pack_images(x)), want).max()<=tol
    assert diff(seeded(build(16, **kw), pack_images([(o/255).half() for o in x])), want).max()<1e-2
    with pytest.raises(ValueError, match='are torch.int16 with values up to .*float'): build(16)(pack_images([o.short()*16 for o in x]))

def test_views_of_images_of_one_size(build):
    "Packed, they have those of the tensor: in the same way, or at least of the same kind"
    x = torch.stack([photo(30, 40, i) for i in range(6)])
    v,t = seeded(build(16, **full), pack_images([*x])),seeded(build(16, **full), x)
    assert v.shape==t.shape and type(v)==type(t)
    if build is get_batch_augs: assert diff(v, t).max()<1e-4

def test_each_view_is_of_its_image(build):
    x = pack_images([torch.full((3,h,w), i/5) for i,(h,w) in enumerate(few)])
    for v in make_views([build(8, **plain|dict(rotate=False, blur=True)) for _ in range(3)], x): assert diff(v, torch.arange(5)[:,None,None,None]/5).max()<1e-3

def test_the_seed_decides_and_images_are_left_alone(build):
    x = pack_images(photos())
    before,pipe = x.clone(),build(16, **full, stats=rgb)
    a = seeded(pipe, x)
    assert torch.equal(a, seeded(pickle.loads(pickle.dumps(pipe)), x)) and not torch.equal(a, pipe(x))
    assert x.pixels.equal(before.pixels)
    mean,std = (tensor(o)[:,None,None] for o in rgb)
    torch.testing.assert_close(pipe.decode(a), seeded(build(16, **full, stats=None), x), atol=1e-5, rtol=0)

def test_views_are_channels_last(one_by_one):
    for each in (True,False):
        one_by_one(each)
        for v in get_batch_augs(16).views(pack_images(photos()), 3): assert v.is_contiguous(memory_format=torch.channels_last)

def test_steps_of_others():
    "On images of their own sizes: one after the other; what is made for a batch says where it belongs"
    x = pack_images(photos())
    for a,b in zip(ApplyTo(tvf.invert, per_image=True)(x), x): torch.testing.assert_close(a.as_subclass(torch.Tensor), 1-b.as_subclass(torch.Tensor)/255)
    pipe = ViewPipeline([ApplyTo(tvf.invert, per_image=True), RandomCropResize(16)], split_idx=0)
    torch.testing.assert_close(seeded(pipe, x), 1-seeded(ViewPipeline([RandomCropResize(16)], split_idx=0), x), atol=tol, rtol=0)
    with pytest.raises(ValueError, match='put it after the crop'): ApplyTo(tvf.invert)(x)
    with pytest.raises(ValueError, match='needs images of one size'): ViewPipeline([RandomFlip(), RandomCropResize(16)], split_idx=0)(x)

@pytest.mark.parametrize('use', [lambda x: x, lambda x: x.images, lambda x: x[0], lambda x: x[1:], lambda x: x.to(torch.float32), lambda x: x.clone(), lambda x: x.pixels, lambda x: pickle.dumps(x),
                                 lambda x: make_views(get_swav_aug_pipelines((1,1), (16,8), (.3,.1), (1.,.3), stats=None), x)],
                         ids=['made','images','one','some','to','clone','pixels','pickled','views'])
def test_a_batch_is_freed(use):
    "with what was taken from it: views of its pixels do not keep it"
    x = pack_images([torch.randint(0, 256, (3,20+i,30), dtype=torch.uint8) for i in range(4)])
    use(x)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None
