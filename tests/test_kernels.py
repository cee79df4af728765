"""Kernels for views, run by Triton's interpreter on a CPU: crops are torchvision's, blur and colours those of the operations of PyTorch; and they compile for cards"""
import subprocess, sys
from contextlib import nullcontext

import pytest, torch
import torchvision.transforms.v2.functional as tvf
from fastai.torch_core import set_seed
from torch import tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from self_supervised import kernels, pixels, views as views_module
from self_supervised.augmentations import *
from self_supervised.packed import pack_images
from self_supervised.pipelines import make_views
from self_supervised.pixels import gaussian_blur, jitter_weights, mix_colors


triton  = pytest.importorskip('triton')
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason='with a card kernels are not interpreted; test_gpu runs them')

def photo(h, w, c=3, dtype=torch.uint8):
    x = torch.randint(0, 256, (c,h,w), dtype=torch.uint8, generator=torch.Generator().manual_seed(100*h+w))
    return x if dtype==torch.uint8 else x/255

@interpreted
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float])
@pytest.mark.parametrize('c', [1,3,5])
@pytest.mark.parametrize('size', [(6,8), (24,5)])
def test_crops_are_those_of_torchvision(c, dtype, size):
    x   = torch.stack([photo(21, 20+i, c, dtype)[...,:20] for i in range(2)])
    box,flip = tensor([[0,0,21,20], [3,5,10,7], [20,19,1,1], [10,4,6,8]]),tensor([True,False,False,True]) # of images 0, 1, 0, 1
    ref = torch.stack([tvf.resized_crop(x[i%2]/255 if dtype==torch.uint8 else x[i%2], *b.tolist(), size=size, antialias=True) for i,b in enumerate(box)])
    ref = torch.where(flip[:,None,None,None], ref.flip(-1), ref)
    for t in (x, x.contiguous(memory_format=torch.channels_last)): # any strides
        res = kernels.crops(t, box, size, flip)
        assert res.is_contiguous(memory_format=torch.channels_last) and res.dtype==torch.float32
        torch.testing.assert_close(res, ref, rtol=0, atol=1e-5)

@interpreted
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float])
@pytest.mark.parametrize('c', [1,3,5])
def test_crops_of_whole_images(c, dtype):
    ims = [photo(*o, c, dtype) for o in ((15,20), (30,11), (1,9))]
    box = tensor([[2,3,10,12], [20,0,10,11], [0,4,1,5], [0,0,30,11], [14,19,1,1]])
    ids = tensor([0,1,2,1,0])
    ref = torch.stack([tvf.resized_crop(ims[i]/255 if dtype==torch.uint8 else ims[i], *b.tolist(), size=(5,8), antialias=True) for i,b in zip(ids, box)])
    torch.testing.assert_close(kernels.crops(pack_images(ims), box, (5,8), None, ids), ref, rtol=0, atol=1e-5)

@interpreted
@pytest.mark.parametrize('c', [1,3,5])
@pytest.mark.parametrize('h,w,kernel_size', [(12,17,13), (5,4,13), (1,9,5)])
def test_blur_mix_is_step_by_step(c, h, w, kernel_size):
    torch.manual_seed(0)
    n = 7
    x,sigma = torch.rand(n,c,h,w),tensor([0,.1,.4,1,2,0,4.])
    wts = jitter_weights(torch.cat([torch.rand(n,3)+.5, torch.rand(n,1)-.5], 1), torch.rand(n,4).argsort(1), c)
    (D,M),m,invert = wts.chunk(2, 2),x.mean((2,3))[...,None],tensor([True,False]*3+[True])
    mean,std = torch.rand(c),torch.rand(c)+.2
    res = kernels.blur_mix(x, D, ((M-D)@m)[...,0], sigma, kernel_size//2, invert, .6, mean, std)
    ref = torch.stack([gaussian_blur(o[None], s[None], kernel_size)[0] if s else o for o,s in zip(x, sigma)])
    ref = mix_colors(ref, wts, m).clamp(0, 1)
    ref = torch.where(invert[:,None,None,None] & (ref>=.6), 1-ref, ref)
    torch.testing.assert_close(res, (ref-mean[:,None,None])/std[:,None,None], rtol=0, atol=1e-5)
    assert res.is_contiguous(memory_format=torch.channels_last)

@pytest.fixture
def engine(monkeypatch):
    "Choose how views are made: with kernels, or with operations of PyTorch"
    def _choose(with_kernels):
        for m in (pixels, views_module):
            monkeypatch.setattr(m, 'one_by_one', lambda x: False)
            monkeypatch.setattr(m, 'has_kernels', lambda x: with_kernels)
    return _choose

kinds = {'all': dict(rotate=True, solarize=True, solarize_p=.5), 'usual': {}, 'crop': dict(jitter=False, bw=False, blur=False, stats=None, flip_p=0.),
         'one for all': dict(same_on_batch=True), 'no blur': dict(blur=False, solarize=True), 'exact hue': dict(exact_hue=True)}

@interpreted
@pytest.mark.parametrize('whole', [False, True])
@pytest.mark.parametrize('kw', kinds.values(), ids=kinds)
def test_views_are_those_of_the_operations(kw, whole, engine):
    x = pack_images([photo(20,24), photo(9,30)]) if whole else torch.stack([photo(20,24), photo(20,25)[...,1:]])
    pipes,res = get_multi_aug_pipelines(1, 12, **kw) + get_multi_aug_pipelines(2, (6,9), **kw),[]
    for o in (True, False):
        engine(o); set_seed(3)
        res.append(make_views(pipes, x))
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in res[0]) or kw.get('exact_hue')
    for a,b in zip(*res): torch.testing.assert_close(a, b, rtol=0, atol=1e-4)

@pytest.mark.parametrize('whole', [False, True])
def test_a_card_is_never_waited_for(whole, monkeypatch):
    "Around the kernels, which tensors without data cannot run"
    done = []
    monkeypatch.setattr(kernels, '_launch', lambda f, *args, **kwargs: done.append(f.__name__))
    pipes = get_multi_aug_pipelines(2, 32, solarize=True)
    if not whole:
        with FakeTensorMode(allow_non_fake_inputs=True): views = make_views(pipes, torch.ones(6, 3, 40, 36, dtype=torch.uint8, device='cuda'))
    else:
        from test_waiting import NoWaiting
        for m in (pixels, views_module): monkeypatch.setattr(m, 'has_kernels', lambda x: True)
        monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext()) # which knows no device `meta`
        x = pack_images([photo(20,24), photo(31,17)]).to('meta')
        make_views(pipes, x)
        done.clear()
        with NoWaiting(): views = make_views(pipes, x)
    assert done==['_crop','_blur_columns','_blur_rows_mix'] and [v.shape[2:] for v in views]==[(32,32)]*2

def test_without_triton(monkeypatch):
    x = torch.empty(1, 3, 8, 8, device='meta')
    with FakeTensorMode(): card = torch.empty(1, 3, 8, 8, device='cuda')
    assert kernels.has_kernels(card) and not kernels.has_kernels(x)
    monkeypatch.setattr(kernels, 'triton', None)
    assert not kernels.has_kernels(card)

compiled = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from self_supervised import kernels as k
floats = dict.fromkeys(('x','sharp','soft','sigma','weights','shift','mean','scale','out'), '*fp32') | dict(flip='*u8', invert='*u8', where='*i64', unit='fp32', threshold='fp32')
for arch in (80, 90):
    for f,c,own in ((k._crop,3,dict(x='*u8')), (k._crop,5,{}), (k._blur_columns,3,{}), (k._blur_rows_mix,3,{}), (k._blur_rows_mix,1,{})):
        given = {n: v for n,v in dict(C=c, C2=k._above(c), N=128).items() if n in f.arg_names}
        sig = {n: 'constexpr' if n in given else (floats | own).get(n, 'i32') for n in f.arg_names}
        assert compile(ASTSource(f, sig, {(f.arg_names.index(n),): v for n,v in given.items()}), target=GPUTarget('cuda', arch, 32)).asm['cubin']
"""

def test_kernels_compile_for_cards(project, tmp_path):
    import os
    env = {k:v for k,v in os.environ.items() if k!='TRITON_INTERPRET'} | dict(TRITON_CACHE_DIR=str(tmp_path))
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', compiled], cwd=project, env=env, capture_output=True, text=True)
    assert r.returncode==0, r.stderr

def test_boxes_that_are_drawn_on_a_card():
    "A step of its own draws where the images are: nothing of the CPU is mixed in"
    with FakeTensorMode(): assert rand_boxes(4, 20, 30, device='cuda').device.type=='cuda'

@interpreted
def test_any_strides():
    "One number may stand for many in memory, and others lie apart"
    torch.manual_seed(0)
    x,box = torch.rand(3,3,9,8),tensor([[1,2,6,5]]).repeat(3,1)
    one = lambda v: tensor([v]).expand(3)
    apart = tensor([True,False,False,False,True,False])[::2]
    views = kernels.crops(x, box, (4,5), apart)
    torch.testing.assert_close(views, kernels.crops(x, box, (4,5), apart.clone()))
    rest  = torch.eye(3).expand(3,3,3),torch.rand(1,3).expand(3,3)
    args  = lambda f: (f(rest[0]), f(rest[1]), f(one(1.)), 2, f(apart), .5, torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(kernels.blur_mix(views, *args(lambda t: t)), kernels.blur_mix(views, *args(torch.Tensor.contiguous)))
