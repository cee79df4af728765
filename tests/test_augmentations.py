"""Views equal torchvision's, in pixels for given parameters and in distribution for random ones; PIL and scipy are the second, independent opinion.

Pixels are in [0,1] and have to agree to 2/255, the step of two gray levels. Where 8-bit arithmetic needs more, it says so."""
import inspect, itertools, pickle, warnings

import numpy as np, pytest, torch
import torchvision.transforms as T, torchvision.transforms.v2.functional as tvf
from fastai.torch_core import set_seed
from fastai.vision.all import Normalize, Pipeline, RandomErasing, TensorImage, TensorImageBW, Transform
from PIL import Image
from scipy import ndimage
from scipy.stats import binomtest, chisquare, ks_2samp
from torch import tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from self_supervised import pixels, transforms, views as views_module
from self_supervised.augmentations import *
from self_supervised.basics import warn_once
from self_supervised.pipelines import make_views
from self_supervised.data import fashion_mnist
from self_supervised.vision.deepcluster import get_deepcluster_aug_pipelines
from self_supervised.vision.sela import get_sela_aug_pipelines
from self_supervised.vision.swav import get_swav_aug_pipelines

tol    = 2/255
shapes = [(64,64), (61,48), (40,90)]
plain  = dict(jitter=False, bw=False, blur=False, stats=None, flip_p=0.)
whole  = dict(resize_scale=(1,1), resize_ratio=(1,1))

def images(h, w, seed=0):
    "Four RGB images (4,3,h,w), uint8: a smooth one, one with hard edges in pure colours, a tinted photograph of clothing, noise"
    g = torch.Generator().manual_seed(seed)
    def _smooth(): return F.interpolate(torch.rand(1,3,5,6, generator=g), (h,w), mode='bicubic')[0].clamp(0,1)
    smooth,edges = _smooth(),_smooth()
    for i,c in enumerate(itertools.product((0.,1.), repeat=3)): # black, the primaries, their mixtures, white
        edges[:,h*i//10:h*i//10+h//4,(w*i*3//8)%(w-w//4):][:,:,:w//4] = tensor(c)[:,None,None]
    edges[:,torch.arange(h)[:,None]*w > 3*torch.arange(w)*h] = tensor([.9,.3,.1])[:,None]
    wear = fashion_mnist()[0][0][:1].float()/255
    wear = F.interpolate(wear, (h,w), mode='bilinear')[0]*tensor([.9,.6,.4])[:,None,None] + tensor([.05,.1,.3])[:,None,None]
    return (torch.stack([smooth, edges, wear, torch.rand(3,h,w, generator=g)])*255).round().byte()

def pils(x): return [Image.fromarray(o.permute(1,2,0).numpy()) for o in x]
def unpil(ims): return torch.stack([tensor(np.array(o)).permute(2,0,1) for o in ims])/255
def diff(a, b): return (a-b).abs()
def agree(p): return p > 1e-3
def same(a, b): return agree(ks_2samp(a, b, method='asymp').pvalue)

# ---- pixels: crop and resize

boxes = tensor([[0,0,40,48], [3,5,30,21], [10,20,11,17], [0,7,37,41]])

@pytest.mark.parametrize('size', [(16,16), (12,20), (8,5), (96,80), (16,96), (37,41)]) # down, up, down one way and up the other
@pytest.mark.parametrize('shape', shapes)
def test_crop_resize(shape, size):
    u = images(*shape)
    def _each(ims, f, **kw): return [f(o, *b, size, **kw) for o,b in zip(ims, boxes.tolist())]
    wants = dict(float=torch.stack(_each(u/255, tvf.resized_crop, antialias=True)),
                 uint8=torch.stack(_each(u, tvf.resized_crop, antialias=True))/255,
                 PIL=unpil(_each(pils(u), T.functional.resized_crop)))
    for x in (u, u/255):
        v = crop_resize(x, boxes, size)
        assert v.dtype==torch.float32 and v.shape==(4,3,*size)
        for k,want in wants.items(): assert diff(v, want).max() <= tol, k
    torch.testing.assert_close(crop_resize(u/255, boxes, size), wants['float'], atol=1e-5, rtol=0)

def test_downscaling_averages():
    "Without antialiasing a resized chessboard is black, white or moiré, but not gray"
    x = ((torch.arange(72)[:,None]+torch.arange(72))%2)[None,None].float()
    assert diff(F.interpolate(x, (8,8), mode='bilinear'), .5).min() > .4
    assert diff(crop_resize(x, tensor([[0,0,72,72]]), (8,8)), .5).max() < .01
    for f in (get_batch_augs, get_torchvision_batch_augs): # the other two builders do not antialias
        assert diff(f(8, **plain, **whole)(x), .5).max() < .01

# ---- pixels: colour. The uint8 and PIL versions round to whole gray levels after each operation; ours does not.

ops     = [tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue]
pil_ops = [T.functional.adjust_brightness, T.functional.adjust_contrast, T.functional.adjust_saturation, T.functional.adjust_hue]
names   = ['brightness', 'contrast', 'saturation', 'hue']
nothing = [1., 1., 1., 0.]

def only(k, a, n=4): return tensor([*nothing[:k], a, *nothing[k+1:]]).repeat(n,1)

amounts = [*((k,a) for k in range(3) for a in (0., .2, .7, 1., 1.3, 1.8)), *((3,a) for a in (-.5, -.2, -.03, 0., .1, .2, .5))]

@pytest.mark.parametrize('k,a,shape', [(k, a, shapes[i%3]) for i,(k,a) in enumerate(amounts)]) # each operation in each shape
def test_one_colour_operation(k, a, shape):
    u = images(*shape)
    v = color_jitter(u/255, only(k, a))
    assert diff(v, ops[k](u/255, a)).max() <= tol
    assert diff(v, ops[k](u, a)/255).max() <= tol
    want = unpil([pil_ops[k](o, a) for o in pils(u)])
    if names[k]!='hue': assert diff(v, want).max() <= tol
    else: # PIL's hue, saturation and value have 8 bits. One step of hue moves a channel of a pure colour by six gray levels, one of saturation by one;
          # rounding there and back makes at most two steps of each. The shift itself is cut to whole steps, as it is here for the comparison.
        pil = diff(color_jitter(u/255, only(k, int(a*255)/256)), want)
        assert pil.max() <= 12/255 and pil.mean() <= 1/255

@pytest.mark.parametrize('shape', shapes)
def test_gray(shape):
    u = images(*shape)
    v = RandomGray(1.)(u/255)
    assert v.shape==u.shape and (v==v[:,:1]).all()
    assert diff(v, tvf.rgb_to_grayscale(u/255, 3)).max() <= tol
    assert diff(v, tvf.rgb_to_grayscale(u, 3)/255).max() <= tol
    assert diff(v, unpil([T.functional.to_grayscale(o, 3) for o in pils(u)])).max() <= tol

@pytest.mark.parametrize('factors', [(1.5,.6,1.4,.15), (.4,1.7,.3,-.2), (1.8,1.8,1.8,.2)])
def test_color_jitter_in_all_orders(factors):
    "Clamped after each operation, as torchvision does: the last factors saturate"
    u,fs = images(61, 48),tensor(factors).repeat(4,1)
    results = []
    for order in itertools.permutations(range(4)):
        v,want = color_jitter(u/255, fs, tensor(order).repeat(4,1)),u/255
        for k in order: want = ops[k](want, factors[k])
        assert diff(v, want).max() <= tol, order
        results.append(v)
    assert len(torch.stack(results).flatten(1).round(decimals=3).unique(dim=0)) > 12 # or the order would not matter here

def test_color_jitter_against_pil():
    "Four roundings and the hue's 8 bits, then stretched by factors above 1: single pixels differ by more than 2/255, the mean does not"
    u,factors = images(61, 48),(1.2,.8,1.3,.1)
    for order in ((0,1,2,3), (3,2,1,0), (2,0,3,1), (1,3,0,2)):
        want = pils(u)
        for k in order: want = [pil_ops[k](o, factors[k]) for o in want]
        assert diff(color_jitter(u/255, tensor(factors).repeat(4,1), tensor(order).repeat(4,1)), unpil(want)).mean() <= tol

def test_each_image_has_its_own_factors_and_order():
    x = images(24, 32)/255
    factors = torch.stack([torch.empty(4).uniform_(.2, 1.8) for _ in range(3)] + [torch.empty(4).uniform_(-.2, .2)], 1)
    order = tensor([[0,1,2,3], [3,1,0,2], [2,3,1,0], [1,0,3,2]])
    v = color_jitter(x, factors, order)
    for i in range(4):
        want = x[i]
        for k in order[i].tolist(): want = ops[k](want, factors[i,k].item())
        assert diff(v[i], want).max() <= tol

@pytest.mark.parametrize('c', [1,2,4,13])
def test_color_jitter_of_other_channels(c):
    "Brightness and contrast, about the mean of everything; nothing else"
    x,fs = torch.rand(2,c,9,11),tensor([[1.3,.6,.1,.4]]).repeat(2,1)
    b = (x*1.3).clamp(0,1)
    want = .6*b + .4*b.mean((1,2,3), keepdim=True)
    torch.testing.assert_close(color_jitter(x, fs), want, atol=1e-5, rtol=0)
    if c==1: torch.testing.assert_close(want, tvf.adjust_contrast(tvf.adjust_brightness(x, 1.3), .6), atol=1e-5, rtol=0)

# ---- pixels: blur and rotation. PIL's Gaussian is made of boxes, so here scipy is the second opinion.

@pytest.mark.parametrize('shape', shapes)
@pytest.mark.parametrize('ks', [3, 13, 23])
def test_gaussian_blur(shape, ks):
    u,sigma = images(*shape),tensor([.1, .6, 1.3, 3.])
    v = gaussian_blur(u/255, sigma, ks)
    assert diff(v, torch.stack([tvf.gaussian_blur(o, ks, s) for o,s in zip(u/255, sigma.tolist())])).max() <= tol
    assert diff(v, torch.stack([tvf.gaussian_blur(o, ks, s) for o,s in zip(u, sigma.tolist())])/255).max() <= tol
    want = [ndimage.gaussian_filter((o/255).numpy(), s, axes=(1,2), mode='mirror', radius=ks//2) for o,s in zip(u, sigma.tolist())]
    assert diff(v, tensor(np.stack(want))).max() <= tol

@pytest.mark.parametrize('c', [1,4])
def test_blur_of_other_channels(c):
    x = torch.rand(2,c,20,16)
    assert diff(gaussian_blur(x, tensor([.5,2.]), 9), torch.stack([tvf.gaussian_blur(o, 9, s) for o,s in zip(x, (.5,2.))])).max() <= tol

@pytest.mark.parametrize('shape', shapes)
def test_rotate(shape):
    "torchvision fills the corners with black and we mirror: there scipy is the reference, elsewhere both are"
    u,deg = images(*shape)/255,tensor([0., 7., -30., 90.])
    v = rotate(u, deg)
    for o,x,d in zip(v, u, deg.tolist()):
        kw = dict(interpolation=tvf.InterpolationMode.BILINEAR)
        inside = tvf.rotate(torch.ones(1,*shape), d, **kw) > .999
        inside = -F.max_pool2d(-inside.float(), 3, 1, 1)[0] > 0
        assert inside.float().mean() > .3
        assert diff(o, tvf.rotate(x, d, **kw))[:,inside].max() <= tol
        c,s = np.cos(np.radians(d)),np.sin(np.radians(d))
        m,mid = np.array([[c,s],[-s,c]]),(np.array(shape)-1)/2
        want = [ndimage.affine_transform(ch.numpy(), m, mid-m@mid, order=1, mode='reflect') for ch in x]
        assert diff(o, tensor(np.stack(want))).max() <= tol

# ---- chance: what a pipeline passes to the functions above, against torchvision's draws

n_draws = 4000

@pytest.fixture
def drawn(monkeypatch):
    "Parameters that pipelines pass to `crop_resize`, `rotate`, `color_jitter` and `gaussian_blur`, which leave marks instead of working"
    seen = dict(boxes=[], degrees=[], factors=[], order=[], sigma=[])
    def _crop(x, boxes, size): # channel 0 grows to the right, the others are constant and different
        seen['boxes'].append(boxes)
        return torch.stack([torch.linspace(0,1,4).expand(4,4), torch.full((4,4),.3), torch.full((4,4),.7)]).repeat(len(x),1,1,1)
    def _rotate(x, degrees):
        seen['degrees'].append(degrees)
        return x+1000
    def _jitter(x, factors, order, exact_hue):
        seen['factors'].append(factors); seen['order'].append(order)
        return x+10
    def _blur(x, sigma, kernel_size):
        seen['sigma'].append(sigma)
        return x+100
    for k,f in dict(crop_resize=_crop, rotate=_rotate, color_jitter=_jitter, gaussian_blur=_blur).items(): monkeypatch.setattr(transforms, k, f)
    monkeypatch.setattr(ViewPipeline, '__call__', Pipeline.__call__) # step by step; that all at once is the same has tests of its own
    return seen

def draw(n=n_draws, shape=(8,8), **kwargs): return get_batch_augs(4, stats=None, **kwargs)(torch.zeros(1,3,*shape).expand(n,3,*shape))

def marks(v):
    "Which images were flipped, jittered, made gray, blurred: (n,4), read off the marks of `drawn`"
    m = v[:,2].mean((1,2)) % 1000
    return torch.stack([v[:,0,0,0]>v[:,0,0,-1], m%100>5, diff(v[:,1], v[:,2]).amax((1,2))<.1, m>50], 1)

@pytest.mark.parametrize('shape,scale,ratio', [
    ((224,224), (.25,1.),  (3/4,4/3)),
    ((224,160), (.2,1.),   (3/4,4/3)),
    ((40,60),   (.08,1.),  (3/4,4/3)),
    ((100,30),  (.3,1.),   (3/4,4/3)), # often none of ten fits
    ((28,28),   (.05,.14), (3/4,4/3)), # rounding to pixels makes ties, which only make the test milder
    ((96,80),   (.05,.14), (3/4,4/3)),
    ((60,90),   (.1,.5),   (.4,3.)),
])
def test_boxes_are_drawn_as_torchvision_draws_them(drawn, shape, scale, ratio):
    draw(shape=shape, resize_scale=scale, resize_ratio=ratio)
    ours,img = torch.cat(drawn['boxes']),torch.zeros(1,*shape)
    theirs = tensor([T.RandomResizedCrop.get_params(img, scale, ratio) for _ in range(n_draws)])
    assert ours.shape==theirs.shape
    (t,l,h,w),(H,W) = ours.T,shape
    assert (t>=0).all() and (l>=0).all() and (h>0).all() and (w>0).all() and (t+h<=H).all() and (l+w<=W).all()
    def _props(b):
        t,l,h,w = b.double().T
        return dict(area=h*w/(H*W), aspect=(w/h).log(), top=t/H, left=l/W, bottom=(t+h)/H, right=(l+w)/W,
                    row=t/(H-h).clamp(min=1), col=l/(W-w).clamp(min=1))
    ours,theirs = _props(ours),_props(theirs)
    for k in ours: assert same(ours[k], theirs[k]), k
    assert abs(np.corrcoef(ours['row'], ours['col'])[0,1]) < .08 or shape==(100,30)

@pytest.mark.parametrize('shape,scale,ratio', [((10,1000),(1.,1.),(3/4,4/3)), ((1000,10),(1.,1.),(3/4,4/3)), ((48,40),(1.,1.),(1.,1.)),
                                               ((40,48),(1.,1.),(1.,1.)), ((50,60),(1.5,1.5),(3/4,4/3)), ((7,31),(2.,3.),(.9,1.1)), ((1,1),(.1,.2),(3/4,4/3))])
def test_box_when_none_fits(shape, scale, ratio):
    want = [list(T.RandomResizedCrop.get_params(torch.zeros(1,*shape), scale, ratio))]
    assert rand_boxes(3, *shape, scale, ratio).tolist() == want*3

@pytest.mark.parametrize('s', [.3, 1., 2.])
def test_jitter_is_drawn_as_torchvision_draws_it(drawn, s):
    draw(jitter_s=s, jitter_p=1.)
    tv = T.ColorJitter(.8*s, .8*s, .8*s, .2*s)
    theirs = [tv.get_params(tv.brightness, tv.contrast, tv.saturation, tv.hue) for _ in range(n_draws)]
    f,order = torch.cat(drawn['factors']),torch.cat(drawn['order'])
    assert f.shape==order.shape==(n_draws,4)
    for k,name in enumerate(names): assert same(f[:,k], [o[k+1] for o in theirs]), name
    assert np.abs(np.corrcoef(f.T.numpy())-np.eye(4)).max() < .08
    perms = list(itertools.permutations(range(4)))
    counts = np.bincount([perms.index(tuple(o)) for o in order.tolist()], minlength=24)
    assert agree(chisquare(counts).pvalue)

@pytest.mark.parametrize('s', [(.1,2.), (.5,.6), (3.,9.)])
def test_sigma_is_drawn_as_torchvision_draws_it(drawn, s):
    draw(blur_s=s, blur_p=1.)
    assert same(torch.cat(drawn['sigma']), [T.GaussianBlur.get_params(*s) for _ in range(n_draws)])

def test_a_fixed_sigma(drawn):
    draw(10, blur_s=1.5, blur_p=1.)
    assert drawn['sigma'][0].tolist()==[1.5]*10

@pytest.mark.parametrize('deg', [30, 5.])
def test_angle_is_drawn_as_torchvision_draws_it(drawn, deg):
    draw(rotate=True, rotate_deg=deg, rotate_p=1.)
    assert same(torch.cat(drawn['degrees']), [T.RandomRotation.get_params([-deg,deg]) for _ in range(n_draws)])

@pytest.mark.parametrize('ps', [(.5,.8,.2,.5), (.3,.1,.6,.9)])
def test_every_step_happens_with_its_probability_and_independently(drawn, ps):
    flip_p,jitter_p,bw_p,blur_p = ps
    m = marks(draw(flip_p=flip_p, jitter_p=jitter_p, bw_p=bw_p, blur_p=blur_p))
    for k,p in enumerate(ps): assert agree(binomtest(int(m[:,k].sum()), n_draws, p).pvalue), ('flip','jitter','gray','blur')[k]
    counts = np.bincount((m.long()*tensor([8,4,2,1])).sum(1), minlength=16)
    joint  = [np.prod([p if b else 1-p for p,b in zip(ps, bits)]) for bits in itertools.product((0,1), repeat=4)]
    assert agree(chisquare(counts, np.array(joint)*n_draws).pvalue)

@pytest.mark.parametrize('p', [.3, .7])
def test_probability_of_rotation(drawn, p):
    draw(rotate=True, rotate_p=p)
    assert agree(binomtest(sum(map(len, drawn['degrees'])), n_draws, p).pvalue)

def test_defaults_are_those_of_the_papers(drawn):
    a = {k:p.default for k,p in inspect.signature(get_batch_augs).parameters.items()}
    assert (a['rotate'], a['jitter'], a['bw'], a['blur'], a['same_on_batch']) == (False, True, True, True, False)
    assert (a['flip_p'], a['jitter_p'], a['bw_p'], a['blur_p'], a['jitter_s'], a['blur_s']) == (.5, .8, .2, .5, 1., (.1,2.))
    m = marks(draw())
    for k,p in enumerate((.5,.8,.2,.5)): assert agree(binomtest(int(m[:,k].sum()), n_draws, p).pvalue)

def test_draws_once_for_a_batch_if_asked(drawn):
    kw = dict(rotate=True, rotate_p=.5, same_on_batch=True)
    ms = []
    for _ in range(200):
        m = marks(draw(3, (20,20), **kw))
        assert (m==m[:1]).all()
        ms.append(m[0])
    for k,os in drawn.items(): # one value in a call, and others in the next
        assert all((o==o[:1]).all() for o in os), k
        assert len(torch.stack([o[0] for o in os]).unique(dim=0)) > 20, k
    for k,p in enumerate((.5,.8,.2,.5)): assert agree(binomtest(int(torch.stack(ms)[:,k].sum()), 200, p).pvalue)

# ---- all of it at once, in pixels: nothing is recorded or replaced

@pytest.mark.parametrize('other,size,shape', [(get_torchvision_batch_augs,16,(36,28)), (get_kornia_batch_augs,32,(24,24))]) # kornia only enlarges well
def test_views_look_like_those_of(other, size, shape):
    x = (images(*shape)[:3]/255).repeat(400,1,1,1)
    kw = dict(resize_scale=(.2,.8), jitter_s=.7, jitter_p=.9, bw_p=.3, blur_p=.7, blur_s=(1.,2.5), stats=None)
    def _props(f):
        v = torch.cat([f(size, **kw)(o) for o in x.split(300)])
        gray = v.mean(1)
        return dict(level=v.mean((1,2,3)), contrast=v.std((1,2,3)), colour=v.std(1).mean((1,2)), red=(v[:,0]-v[:,2]).mean((1,2)),
                    slant=(gray[:,:,:size//2]-gray[:,:,size//2:]).mean((1,2)), height=(gray[:,:size//2]-gray[:,size//2:]).mean((1,2)),
                    detail=diff(gray[:,1:], gray[:,:-1]).mean((1,2))/(gray.std((1,2))+.01))
    ours,theirs = _props(get_batch_augs),_props(other)
    for k in ours: assert same(ours[k], theirs[k]), k

# ---- every builder

builders  = [get_batch_augs, get_torchvision_batch_augs, get_kornia_batch_augs, get_fastai_batch_augs]
every     = pytest.mark.parametrize('f', builders, ids=lambda f: f.__name__)
arguments = ('size rotate jitter bw blur resize_scale resize_ratio rotate_deg jitter_s blur_s same_on_batch '
             'flip_p rotate_p jitter_p bw_p blur_p stats cuda xtra_tfms exact_hue saturation solarize solarize_p').split()
full      = dict(rotate=True, rotate_p=.5, jitter_p=.5, bw_p=.5, flip_p=.5, blur_p=.5, blur_s=(.1,1.))
rgb       = ([.4,.5,.6], [.2,.3,.25])

def distinct(v): return len(v.mul(1e4).round().unique(dim=0))
def seeded(pipe, x):
    set_seed(7)
    return pipe(x)

@every
def test_arguments(f):
    ps = inspect.signature(f).parameters.values()
    assert {p.name for p in ps} == {*arguments, *(['min_scale','max_lighting'] if f is get_fastai_batch_augs else [])} and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in ps)
    own = inspect.signature(get_batch_augs).parameters
    assert all(p.default==own[p.name].default for p in ps if p.name in own)

def test_arguments_of_several():
    assert list(inspect.signature(get_multi_aug_pipelines).parameters) == ['n', *arguments]

@every
def test_arguments_by_position(f):
    given = dict(size=16, rotate=True, jitter=True, bw=True, blur=True, resize_scale=(.5,.6), resize_ratio=(1.,1.5), rotate_deg=12, jitter_s=.4, blur_s=(.3,.4), same_on_batch=False,
                 flip_p=.1, rotate_p=.2, jitter_p=.3, bw_p=.4, blur_p=.6, stats=rgb, cuda=False, xtra_tfms=[], min_scale=.5, max_lighting=.3)
    vals = [given[k] for k in itertools.takewhile(lambda k: k!='exact_hue', inspect.signature(f).parameters)]
    a,b = f(*vals),f(**dict(zip(inspect.signature(f).parameters, vals)))
    assert repr(a)==repr(b)
    x = images(20, 24)/255
    assert torch.equal(seeded(a, x), seeded(b, x))
    assert repr(f(*vals[:5]))==repr(f(16, rotate=True))
    with pytest.raises(TypeError, match='colour'): f(16, colour=True)

@every
def test_pipeline(f):
    for p in (f(16), f(16, True, False, False, False, stats=None)):
        assert isinstance(p, Pipeline) and p.split_idx==0
    assert assert_aug_pipelines([f(16)])

def test_several_pipelines():
    pipes = get_multi_aug_pipelines(3, (12,16), blur=False, stats=None)
    assert len(pipes)==3 and len({id(o) for o in pipes})==3 and assert_aug_pipelines(pipes)
    assert all('Blur' not in repr(o) and o(torch.rand(2,3,20,20)).shape==(2,3,12,16) for o in pipes)

steps = dict(crop=dict(resize_scale=(.2,.8), resize_ratio=(3/4,4/3)), flip=dict(flip_p=.5), rotate=dict(rotate=True, rotate_p=1.),
             jitter=dict(jitter=True, jitter_p=1.), bw=dict(bw=True, bw_p=.5), blur=dict(blur=True, blur_p=1., blur_s=(.3,3.)))

@every
@pytest.mark.parametrize('step', steps)
def test_every_step_is_drawn_per_image(f, step):
    x = (images(32, 32)[1:2]/255).expand(24,3,32,32)
    kw = {**plain, **whole, **steps[step]}
    v = f(32, **kw)(x)
    assert distinct(v)==2 if step in ('flip','bw') else distinct(v)>18
    same = [f(32, same_on_batch=True, **kw)(x) for _ in range(20)]
    for o in same: assert diff(o, o[:1]).max() < 1e-5
    first = torch.stack([o[0] for o in same]) # and drawn anew for the next batch
    assert distinct(first)==2 if step in ('flip','bw') else distinct(first)>14

@every
def test_without_steps_only_the_size_changes(f):
    x = images(24, 24)/255
    assert diff(f(24, **plain, **whole)(x), x).max() < 1e-4

@every
@pytest.mark.parametrize('p', [.2, .7])
def test_probabilities_of_other_builders(f, p):
    "Flip and gray can be read off the views"
    n = 600
    x = torch.stack([torch.linspace(0,1,8).expand(8,8), torch.full((8,8),.3), torch.full((8,8),.9)]).expand(n,3,8,8)
    v = f(8, **{**plain, 'bw':True, 'flip_p':p, 'bw_p':1-p}, **whole)(x)
    flipped,gray = v[:,0,4,0]>v[:,0,4,-1],diff(v[:,1], v[:,2]).amax((1,2))<.05
    assert agree(binomtest(int(flipped.sum()), n, p).pvalue) and agree(binomtest(int(gray.sum()), n, 1-p).pvalue)

@every
def test_crop_of_other_builders(f):
    "Mean area and place of the crop, read off an image that holds its own coordinates"
    n,g = 600,(torch.arange(64)+.5)/64
    x = torch.stack([g.expand(64,64), g[:,None].expand(64,64)]).expand(n,2,64,64)
    v = f(64, **plain, resize_scale=(.2,.6))(x)
    w,h = (v[:,0,32,47]-v[:,0,32,16])*64/31,(v[:,1,47,32]-v[:,1,16,32])*64/31
    assert abs((w*h).mean()-.4) < .02 and .18 < (w*h).min() and (w*h).max() < .64 # in the middle of 0.2 and 0.6
    assert abs((w/h).log().mean()) < .03 and .2 < (w/h).log().abs().max() < .35 # log(4/3)=0.29, and whole pixels
    assert diff(v[:,:,31:33,31:33].mean((0,2,3)), .5).max() < .03

@every
@pytest.mark.parametrize('c', [1,3,4,13])
def test_channels_types_and_sizes(f, c):
    for h,w in ((40,28), (8,9)): # larger and smaller than the crop
        for size in (16, (12,20), [20,12]):
            for x in (torch.rand(3,c,h,w), torch.randint(0, 256, (3,c,h,w), dtype=torch.uint8)):
                with warnings.catch_warnings():
                    warnings.filterwarnings('ignore', 'images with')
                    v = f(size, stats=None, **full)(x)
                assert v.shape==(3,c,*((size,size) if isinstance(size, int) else size))
                assert type(v) is torch.Tensor and v.dtype==torch.float32 and v.isfinite().all()
                assert v.min()>=-1e-4 and v.max()<=1+1e-4

class Tile(TensorImage): pass # somebody's own

@every
@pytest.mark.parametrize('kind', [torch.Tensor, TensorImage, TensorImageBW, Tile])
def test_the_class_of_the_images_is_that_of_the_views(f, kind):
    "fastai's images give fastai's images, at no other price than a plain tensor's: the work is done on plain ones"
    x = images(24, 20).as_subclass(kind)
    pipe = f(16, **full)
    for p,x in ((pipe, x), (pipe, x.float()/255), (get_batch_augs(16, xtra_tfms=[lambda o: o*1]), x)):
        assert type(p(x)) is kind and torch.equal(seeded(p, x).as_subclass(torch.Tensor), seeded(p, x.as_subclass(torch.Tensor)))
    assert type(pipe.decode(pipe(x))) is kind and all(type(v) is kind for v in pipe.views(x, 3))
    assert [type(v) for v in make_views(get_multi_aug_pipelines(2, 8)+[pipe], x)]==[kind]*3

@every
@pytest.mark.parametrize('dtype,top,says', [(torch.uint16,65535,'65535'), (torch.int16,4000,'4095'), (torch.int32,10_000,'16383'), (torch.int64,200,r'x\.to\(torch\.uint8\)')])
def test_whole_numbers_of_more_than_8_bits_are_refused(f, dtype, top, says):
    "To divide them by 255 would make white of nearly all of them"
    x = torch.full((2,3,20,20), top, dtype=torch.int64).to(dtype)
    for p in (f(16, stats=None), f(16, False, False, False, False)):
        with pytest.raises(ValueError, match=f'are {dtype} with values up to {top}: .*{says}'): p(x)
    with pytest.raises(ValueError, match='channels last.*permute'): f(16)(torch.rand(2,20,24,3))

@every
@pytest.mark.parametrize('dtype', [torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_types_that_lose_nothing_are_taken(f, dtype):
    x = torch.rand(2,3,20,20).round().to(dtype)
    assert torch.allclose(seeded(f(16, stats=None), x).float(), seeded(f(16, stats=None), x.float()), atol=1e-2)

@every
def test_uint8_and_float_give_the_same_view(f):
    u = images(40, 30)
    kw = {**plain, 'flip_p':.5}
    assert diff(seeded(f(16, **kw), u), seeded(f(16, **kw), u/255)).max() <= tol
    kw = {**full, 'stats':None}
    assert diff(seeded(f(16, **kw), u), seeded(f(16, **kw), u/255)).mean() <= tol

@every
def test_batch_of_one(f):
    for _ in range(8): assert f(16, **full)(torch.rand(1,3,20,20)).shape==(1,3,16,16)

@every
@pytest.mark.parametrize('p', [0., .5, 1.])
def test_the_images_are_left_alone(f, p):
    "Several pipelines read the same batch"
    for x in (images(24, 24)/255, images(24, 24)):
        y = x.clone()
        for o in (whole, {}): f(24, rotate=True, flip_p=p, rotate_p=p, jitter_p=p, bw_p=p, blur_p=p, stats=rgb, **o)(x)
        assert torch.equal(x, y)

def test_a_single_transform_leaves_the_images_alone():
    for t in (RandomCropResize(16, (1,1), (1,1)), RandomFlip(.5), RandomRotate(p=.5), RandomJitter(p=.5), RandomGray(.5), RandomGaussianBlur(.5), NormalizeView(*rgb)):
        x = images(16, 16).repeat(4,1,1,1)/255
        y = x.clone()
        assert not torch.equal(t(x), y) or isinstance(t, RandomCropResize)
        assert torch.equal(x, y), t

@every
def test_normalised_last_and_decoded(f):
    x = images(24, 30)/255
    v,n,pipe = seeded(f(16, stats=None, **full), x),seeded(f(16, stats=rgb, **full), x),f(16, stats=rgb, **full)
    mean,std = (tensor(o)[:,None,None] for o in rgb)
    torch.testing.assert_close(n, (v-mean)/std, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pipe.decode(n), v, atol=1e-5, rtol=0)
    assert torch.equal(f(16, stats=None).decode(v), v)
    gray = f(16, **plain | {'stats':([.3],[.2])})
    assert gray(x[:,:1]).shape==(4,1,16,16) and gray(x[:,:1]).min()<0

@every
def test_is_pickled(f):
    "`learn.export` needs it, before and after use"
    x = images(24, 24)
    for pipe in (f(16, **full), f(16, **full)):
        a = seeded(pipe, x)
        for p in (pipe, f(16, **full)):
            q = pickle.loads(pickle.dumps(p))
            assert q.split_idx==0 and torch.equal(seeded(q, x), a)

@every
def test_the_seed_decides(f):
    x = images(24, 24)
    a = seeded(f(16, **full), x)
    assert torch.equal(a, seeded(f(16, **full), x)) and not torch.equal(a, f(16, **full)(x))

@every
def test_more_transforms(f):
    "Functions and fastai's transforms, before normalisation unless their order says otherwise; a transform is undone when views are decoded"
    class Last(Transform):
        order = 100
        def encodes(self, x:torch.Tensor): return x+5
    x = torch.rand(4,3,20,20)*.5+.25
    v = seeded(f(16, **plain), x)
    def _run(stats=None, *tfms): return seeded(f(16, **{**plain, 'stats':stats}, xtra_tfms=list(tfms)), x)
    mean,std = (tensor(o)[:,None,None] for o in rgb)
    torch.testing.assert_close(_run(rgb, lambda o: o*2), (v*2-mean)/std)
    torch.testing.assert_close(_run(rgb, Last()), (v-mean)/std+5)
    torch.testing.assert_close(_run(None, ApplyTo(T.RandomInvert(1.), per_image=True)), 1-v)
    norm = Normalize.from_stats(*rgb, cuda=False) # fastai's go by type: a plain tensor they would leave as it is
    n = _run(None, norm)
    assert type(n) is torch.Tensor
    torch.testing.assert_close(n, (v-mean)/std, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(f(16, **plain, xtra_tfms=[norm]).decode(n), v, atol=1e-5, rtol=0)
    assert diff(_run(None, RandomErasing(p=1., sh=.3)), v).max() > .1

# ---- together, and on other devices: the same pixels in another way

def agree_in_pixels(a, b, most=tol, mean=.1/255): assert diff(a, b).max() <= most and diff(a, b).mean() <= mean

calm = dict(jitter_s=.4, stats=None) # and images of middling colours: nothing to clamp
def middling(h, w, c=3): return (images(h, w).repeat(5,5,1,1)[:,:c].float()*.2+90).byte()

pipes = dict(all={}, rotated=dict(rotate=True, rotate_p=.5), sharp=dict(blur=False), gray=dict(bw_p=1.), plain=dict(jitter=False, bw=False),
             one=dict(same_on_batch=True), normalised=dict(stats=rgb), wide=dict(blur_p=1., blur_s=(2.,5.)))

sizes = [(32,3), ((13,29),3), ((1,7),3), ((9,10),1), (24,5)]

@pytest.mark.parametrize('nm,size,c,dtype', [(nm, *o, (torch.uint8, torch.float)[(i+j)%2]) for i,nm in enumerate(pipes) for j,o in enumerate(sizes)]) # all pairs
def test_together_is_step_by_step(nm, size, c, dtype):
    "The kernel is cut at three times its own sigma in the one, the largest in the other: a share of 0.003"
    x,kw = middling(40, 31, c),pipes[nm]
    if dtype==torch.float: x = x/255
    if c!=3: kw = {**kw, 'stats':None}
    pipe = get_batch_augs(size, **{**calm, **kw})
    assert type(pipe) is ViewPipeline
    set_seed(7); a = pipe(x)
    set_seed(7); b = Pipeline.__call__(pipe, x)
    assert a.is_contiguous(memory_format=torch.channels_last) and a.shape==b.shape
    agree_in_pixels(pipe.decode(a), pipe.decode(b))

def test_together_with_clamping():
    "Bright and saturated images, where it matters that only the end is clamped: the same on average"
    x = images(48, 48).repeat(50,1,1,1)
    pipe = get_batch_augs(32, stats=None)
    set_seed(7); a = pipe(x)
    set_seed(7); b = Pipeline.__call__(pipe, x)
    assert a.min()>=0 and a.max()<=1
    assert diff(a, b).mean() < 5/255 and abs((a-b).mean()) < 2/255

@pytest.fixture
def one_by_one(monkeypatch):
    "Choose the engine: that of a CPU, or that of other devices"
    def _choose(each):
        for m in (pixels, views_module): monkeypatch.setattr(m, 'one_by_one', lambda x: each)
    return _choose

@pytest.mark.parametrize('size', [(16,16), (12,20), (8,5), (96,80), (16,96), (37,41)])
@pytest.mark.parametrize('shape', shapes)
def test_crop_resize_at_once(shape, size, one_by_one):
    one_by_one(False)
    x = images(*shape)
    b = tensor([[0,0,*shape], [3,5,30,21], [10,20,11,17], [shape[0]-7,shape[1]-9,7,9]])
    ref = torch.stack([tvf.resized_crop(o, *p, size=size, antialias=True) for o,p in zip(x/255, b.tolist())])
    assert diff(crop_resize(x, b, size), ref).max() < 1e-4 and diff(crop_resize(x/255, b, size), ref).max() < 1e-4

@pytest.mark.parametrize('size,c', [(32,3), ((13,29),3), ((9,10),1), (24,5)])
@pytest.mark.parametrize('kw', pipes.values(), ids=pipes)
def test_at_once_is_one_by_one(kw, size, c, one_by_one):
    "The path of other devices, on this one; the resized uint8 image is rounded in the one and not in the other"
    x,kw = images(40, 31).repeat(5,5,1,1)[:,:c],{**kw, 'stats':None} if c!=3 else kw
    for pipe in (get_batch_augs(size, **kw), get_batch_augs(size, exact_hue=True, jitter_s=.3, **kw)):
        res = []
        for each in (True, False):
            one_by_one(each)
            for o in (x, x/255): set_seed(7); res.append(pipe.decode(pipe(o)))
        for o in res: agree_in_pixels(o, res[1], 4/255, 1/255) # jitter multiplies what rounding has left

@pytest.mark.parametrize('kw,dtype', [({}, torch.uint8), ({}, torch.float), (dict(exact_hue=True), torch.uint8), (dict(exact_hue=True), torch.float),
    (dict(rotate=True), torch.uint8), (dict(same_on_batch=True), torch.float), (dict(stats=None, blur=False), torch.uint8)], ids=repr)
def test_a_gpu_is_never_waited_for(kw, dtype, monkeypatch):
    "Tensors without data refuse to tell a value or to mix devices; the operations of PyTorch, test_kernels has the kernels"
    for m in (pixels, views_module): monkeypatch.setattr(m, 'has_kernels', lambda x: False)
    pipes = get_multi_aug_pipelines(2, 32, **kw) + get_multi_aug_pipelines(3, (12,16), **kw)
    with FakeTensorMode(allow_non_fake_inputs=True): views = make_views(pipes, torch.ones(6, 3, 40, 36, device='cuda').to(dtype))
    assert [(v.shape[2:], v.device.type, v.dtype) for v in views] == [((32,32),'cuda',torch.float)]*2 + [((12,16),'cuda',torch.float)]*3

@pytest.mark.parametrize('each', [True, False])
def test_views_are_as_precise_under_autocast(each, one_by_one):
    one_by_one(each)
    x,pipe = images(40, 36),get_batch_augs(24, rotate=True, stats=None)
    a = seeded(pipe, x)
    with torch.autocast('cpu', torch.bfloat16): b = seeded(pipe, x)
    assert b.dtype==torch.float32 and torch.equal(a, b)

# ---- all colours as one matrix

def test_linear_jitter_is_exact_but_for_hue_and_clamping():
    x = middling(16, 16)[:24].float()/255
    g = torch.Generator().manual_seed(1)
    factors = torch.cat([torch.rand(24, 3, generator=g)+.5, torch.zeros(24,1)], 1)
    order = tensor(list(itertools.permutations(range(4))))[torch.arange(len(x))%24]
    factors = factors[torch.arange(len(x))%24]
    assert diff(color_jitter(x, factors, order, False), color_jitter(x, factors, order)).max() < 1e-5

def test_linear_hue():
    "A turn around the gray axis: gray stays, as does the mean of the channels; a third of the circle is an exchange of channels, as it is for true hue"
    x = images(32, 32)/255
    def _hue(x, d): return color_jitter(x, tensor([1.,1,1,d]).expand(len(x), 4), None, False)
    gray = x.mean(1, keepdim=True).expand_as(x)
    assert diff(_hue(gray, .2), gray).max() < 1e-5
    soft = x*.2+.4
    assert diff(_hue(soft, .17).mean(1), soft.mean(1)).max() < 1e-5
    for d in (1/3, -1/3): assert diff(_hue(x, d), tvf.adjust_hue(x, d)).max() < 1e-4
    assert diff(_hue(x, .02), tvf.adjust_hue(x, .02)).mean() < 5/255

def test_exact_hue():
    x = images(24, 24).repeat(6,1,1,1)
    kw = dict(**plain | dict(jitter=True), **whole, jitter_p=1.)
    exact,fast = (get_batch_augs(24, exact_hue=o, **kw) for o in (True,False))
    v = seeded(exact, x)
    u = x.float()/255
    set_seed(7)
    exact.fs[0].params(x.shape), exact.fs[1].mask(len(x)), exact.fs[2].mask(len(x)) # drawn in this order
    want = color_jitter(u, *exact.fs[2].params(x.shape))
    assert diff(v, want).max() < 1e-5 and diff(seeded(fast, x), want).max() > .05

# ---- several at once

def test_views_of_a_kind_are_made_together(monkeypatch):
    calls,render = [],views_module._render
    monkeypatch.setattr(views_module, '_render', lambda x, n, s: (calls.append(n), render(x, n, s))[1])
    pipes = get_multi_aug_pipelines(2, 16) + get_multi_aug_pipelines(6, 8) + [get_batch_augs(8)]
    x = images(24, 24)
    views = make_views(pipes, x)
    assert calls==[2,6,1] and [v.shape for v in views]==[(4,3,16,16)]*2+[(4,3,8,8)]*7
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in views)
    flat = torch.cat([v.flatten(1) for v in views[2:]])
    assert distinct(flat)==len(flat)

def test_refuses_one_image_and_one_pipeline():
    with pytest.raises(ValueError, match=r'shape \(3, 20, 20\).*x\[None\]'): get_batch_augs(16)(torch.rand(3,20,20))
    with pytest.raises(TypeError, match='list of Pipelines'): make_views(get_batch_augs(16), torch.rand(2,3,20,20))

def test_each_view_is_of_its_image():
    x = (torch.arange(5)/5)[:,None,None,None].expand(5,3,12,12)
    for v in make_views(get_multi_aug_pipelines(3, 8, jitter=False, stats=None), x): assert diff(v, x[:,:,:8,:8]).max() < 1e-3

def test_one_draw_for_a_batch_is_one_for_each_view():
    x = images(32, 32)[1:2].expand(4,3,32,32)
    views = make_views(get_multi_aug_pipelines(6, 16, same_on_batch=True, blur_p=1.), x)
    for v in views: assert diff(v, v[:1]).max() < 1e-5
    assert distinct(torch.stack([v[0] for v in views]))==6

def test_large_batches_are_worked_on_in_parts(monkeypatch):
    x = images(24, 24).repeat(3,1,1,1)
    pipe = get_batch_augs(16, stats=None)
    a = seeded(pipe, x)
    monkeypatch.setattr(views_module, '_block_pixels', 1)
    assert diff(a, seeded(pipe, x)).max() < 1/255 # the kernel of a part is as wide as its largest sigma wants

# ---- a notice, once

@every
def test_one_notice_for_what_needs_rgb(f):
    warn_once.cache_clear()
    pipes = [f(s, bw_p=1., jitter_p=1., stats=None) for s in (16,16,8,8,8,8,8,8)]
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        for _ in range(2):
            for p in pipes: p(torch.rand(2,1,20,20))
    w = [str(o.message) for o in w if 'channel' in str(o.message)]
    assert len(w)==1 and '1 channel' in w[0] and 'RGB' in w[0]
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        for p in pipes: p(torch.rand(2,3,20,20))
        f(16, False, False, False, stats=None)(torch.rand(2,1,20,20)) # without colour there is nothing to leave out
    assert not [o for o in w if 'channel' in str(o.message)]

# ---- sigma, and what the older package did with it

def older_width(s):
    "What remains of a point after a Gaussian of `s` pixels in a kernel of int(s/4)*2+1, by torchvision"
    k = tvf.gaussian_blur(F.pad(torch.ones(1,1,1,1), [30]*4), [int(s/4)*2+1]*2, [float(s)])[0,0].sum(0)
    return (k*(torch.arange(61)-30)**2).sum().sqrt().item()

@every
@pytest.mark.parametrize('s', [(4,16), [4,32], (8,32), 12, (2.,9.)])
def test_notice_for_a_sigma_from_the_older_package(f, s):
    "It says by how much the same numbers blurred there, and once for all pipelines"
    lo,hi = s if isinstance(s, (tuple,list)) else (s,s)
    there = tuple(round(max(.1, older_width(o)), 1) for o in (lo,hi))
    warn_once.cache_clear()
    with pytest.warns(UserWarning) as w: [f(16, blur_s=s) for _ in range(3)]
    assert [str(o.message).count(f'blur_s={there} is what it did') for o in w]==[1]

@every
def test_no_notice_for_usual_sigmas(f):
    warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        f(16), f(16, blur_s=(.1,5.)), f(16, blur=False, blur_s=(4,16))

# ---- wrong use

@every
@pytest.mark.parametrize('kwargs,match', [
    (dict(size=0),                     r'size=0 .*height, width'),
    (dict(size=-4),                    r'size=-4 '),
    (dict(size=(8,0)),                 r'size=\(8, 0\) '),
    (dict(size=(8,)),                  r'size=\(8,\) '),
    (dict(size=7.5),                   r'size=7.5 '),
    (dict(resize_scale=(1.,.2)),       r'scale=\(1.0, 0.2\) .*\(0.2, 1.0\)'),
    (dict(resize_scale=(0.,1.)),       r'scale=\(0.0, 1.0\) '),
    (dict(resize_ratio=(2.,1.)),       r'ratio=\(2.0, 1.0\) .*\(3/4, 4/3\)'),
    (dict(rotate=True, rotate_deg=-5), r'rotate_deg=-5 '),
    (dict(jitter_s=-1.),               r'jitter_s=-1.0 .*between 0 and 2.5'),
    (dict(jitter_s=3.),                r'jitter_s=3.0 '),
    (dict(blur_s=(2.,1.)),             r'blur_s=\(2.0, 1.0\) .*\(0.1, 2.0\)'),
    (dict(blur_s=0),                   r'blur_s=0 .*positive'),
    (dict(blur_s=(0.,1.)),             r'blur_s=\(0.0, 1.0\) '),
    *((dict(rotate=True) | {k:p},      rf'Random{name}: p={p} .*between 0 and 1') for p in (-.1, 1.5)
      for k,name in dict(flip_p='Flip', rotate_p='Rotate', jitter_p='Jitter', bw_p='Gray', blur_p='GaussianBlur').items()),
    (dict(stats=([.5]*3,[.5])),        r'stats.* 3 mean.* 1 '),
    (dict(stats=([.5],[.5]*3)),        r'stats.* 1 mean.* 3 '),
    (dict(stats=([.5]*3,[.5,0.,.5])),  r'stats.*positive'),
])
def test_refuses(f, kwargs, match):
    "When the pipeline is built, in the same words by every builder"
    with pytest.raises(ValueError, match=match): f(**dict(size=16) | kwargs)

@every
def test_refuses_stats_of_another_length(f):
    with pytest.raises(ValueError, match=r'stats are for 3 channel\(s\) but the images have 1: .*stats=None'): f(16, jitter=False, bw=False)(torch.rand(2,1,20,20))
    with pytest.raises(ValueError, match=r'stats are for 1 channel\(s\) but the images have 3'): f(16, stats=([.5],[.5]))(torch.rand(2,3,20,20))

def test_refuses_an_even_kernel():
    with pytest.raises(ValueError, match='kernel_size=4 must be odd'): RandomGaussianBlur(kernel_size=4)

# ---- kinds of crops

@pytest.mark.parametrize('build', [get_swav_aug_pipelines, get_deepcluster_aug_pipelines, get_sela_aug_pipelines], ids=['swav','deepcluster','sela'])
def test_defaults_are_cut_to_the_kinds_of_crops(build):
    "By position, by name, one number; what is given is never cut"
    for args,kw in (((2,),{}), (((2,),),{}), (((2,),(64,)),{}), ((),dict(num_crops=[2], crop_sizes=[64])), (((2,),(64,),(.3,)),{}), ((),dict(num_crops=(2,), max_scales=(.9,)))):
        pipes = build(*args, **kw)
        crop  = pipes[0].fs[0]
        assert len(pipes)==2 and crop.scale[0]==(.3 if len(args)>2 else inspect.signature(build).parameters['min_scales'].default[0]) and crop.scale[1]==kw.get('max_scales', (1.,))[0]
    assert len(build())==sum(inspect.signature(build).parameters['num_crops'].default) and len(build((1,2), (32,16)))==3
    for kw in (dict(min_scales=(.3,.1)), dict(crop_sizes=(64,32)), dict(max_scales=(1.,.5))):
        with pytest.raises(ValueError, match='give all four the same length'): build((2,), **kw)
    with pytest.raises(ValueError, match='give all four the same length'): build((2,2,2), (64,48,32)) # there are no defaults for a third kind
    with pytest.raises(TypeError, match='num_crop'): build(num_crop=(2,))

def test_no_negative_number_of_views():
    with pytest.raises(ValueError, match='n=-1 views'): get_multi_aug_pipelines(-1, 16)
    assert get_multi_aug_pipelines(0, 16)==[]
