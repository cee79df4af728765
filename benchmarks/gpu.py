"""What views, steps, losses, codes and k-NN cost on a CUDA card. About three minutes.

Images are in memory as uint8: squares of 256 pixels, or whole images of 500×375, a third of them upright. Times are those until the card
has done its work, the median of rounds in which the forms take turns.

- views: those of 256 images on the card, with one recipe (crop, mirror image, jitter, grey, blur, normalisation). Kornia's crops are not
  antialiased. torchvision's transforms draw once a batch, the same crop and colours for all its images. Published for comparison: stable-pretraining
  says 234 ms for two views of 256 images of 224 pixels on an H200.
- step: of `fit` of a Learner with SWAV, MixedPrecision and ChannelsLast on 2×224 + 6×96 views of 256 images, without queue, 3,000 prototypes, SGD of
  torch, loading and copying to the card included, after the first two of an epoch, against the limit: forward, backward and optimiser of the same model on views that are ready.
- GB: the highest memory of the card, above weights, the state of the optimiser and images that wait for their turn.
- losses: value and gradient, from embeddings or scores of the whole batch; launches are the kernels that are started.
- k-NN: 10,000 queries in a bank of 1,281,167 × 2,048 in half precision, k = 20.
"""
import gc, sys, time, warnings
from functools import partial
from statistics import median

import torch
from torch.nn import functional as F

from measure import paired, pictures, save

dev = torch.device('cuda')
bs,counts,sizes,scales = 256,(2,6),(224,96),((.14,1.),(.05,.14))

def card_seconds(f):
    "Time of a call, until the card has done all that was asked of it"
    torch.cuda.synchronize()
    t = time.perf_counter()
    f()
    torch.cuda.synchronize()
    return time.perf_counter()-t

def above(f):
    "Highest memory of the card during a call, above what is there, in GB"
    gc.collect(); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated()-before)/1e9

def launches(f):
    "Kernels that a call starts"
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as p: f()
    return sum(o.count for o in p.key_averages() if 'Launch' in o.key)

def few(n, px):
    "`n` pictures, of which only some differ, made on the card and brought back"
    with torch.device(dev): x = pictures(16, px).cpu()
    return x[torch.arange(n)%16]

def squares(n=bs): return few(n, 256)

def whole(n=bs):
    "Whole images, packed"
    from self_supervised.packed import pack_images
    return pack_images([o[...,:375] if i%3==0 else o[:,:375] for i,o in enumerate(few(n, 500))])

def _images(kind, n): return squares(n) if kind=='squares' else whole(n)

def augs(counts=counts, sizes=sizes, scales=scales):
    from self_supervised.vision.swav import get_swav_aug_pipelines
    return get_swav_aug_pipelines(counts, sizes, *zip(*scales))

# ---- views

def ours(x, *args):
    from self_supervised.pipelines import make_views
    pipes = augs(*args)
    return lambda: make_views(pipes, x)

def operations(x, *args):
    "Ours without the kernels"
    from self_supervised import pixels, views
    f,here = ours(x, *args),views.has_kernels
    def _f():
        for m in (pixels,views): m.has_kernels = lambda x: False
        f()
        for m in (pixels,views): m.has_kernels = here
    return _f

def kornia(x, counts, sizes, scales):
    from self_supervised.augmentations import get_kornia_batch_augs
    pipes = [get_kornia_batch_augs(z, resize_scale=s) for z,s,n in zip(sizes, scales, counts) for _ in range(n)]
    return lambda: [o(x) for o in pipes]

def torchvision(x, counts, sizes, scales):
    "A batch at a time"
    import torchvision.transforms.v2 as tv
    from fastai.vision.core import imagenet_stats
    pipes = [tv.Compose([tv.RandomResizedCrop(z, s, antialias=True), tv.RandomHorizontalFlip(), tv.RandomApply([tv.ColorJitter(.8,.8,.8,.2)], .8), tv.RandomGrayscale(.2),
                         tv.RandomApply([tv.GaussianBlur(13, (.1,2.))], .5), tv.ToDtype(torch.float, scale=True), tv.Normalize(*imagenet_stats)])
             for z,s,n in zip(sizes, scales, counts) for _ in range(n)]
    return lambda: [o(x) for o in pipes]

def views():
    "Rows for each kind of views"
    res = {}
    for nm,args,forms in ((f'2×224 + 6×96 of {bs} squares', (counts,sizes,scales), (ours,operations,kornia,torchvision)),
                          (f'2×224 of {bs} squares', ((2,),(224,),((.08,1.),)), (ours,operations,kornia,torchvision)),
                          (f'2×224 + 6×96 of {bs} whole images', (counts,sizes,scales), (ours,operations))):
        x = (whole() if 'whole' in nm else squares()).to(dev)
        fs = {f.__name__: f(x, *args) for f in forms}
        s,r = paired(fs, 5, card_seconds)
        res[f'Views: {nm}'] = [{'form': o, 'ms': 1e3*s[o], '/ ours': r[o], 'images/s': round(bs/s[o]), 'GB above': above(fs[o]), 'launches': launches(fs[o])} for o in fs]
    return res

# ---- steps

def encoder(name):
    import timm
    return timm.create_model('resnet50', num_classes=0) if name=='ResNet-50' else timm.create_model('vit_small_patch16_224', num_classes=0, dynamic_img_size=True)

def swav(name):
    from self_supervised.vision.swav import create_swav_model
    return create_swav_model(encoder(name), 2048, 128, 3000).to(dev, memory_format=torch.channels_last)

def learner(name, images, amp, steps):
    "Seconds of a step with our library, those of an epoch of `steps` but the first two, which wait for images"
    from fastai.callback.channelslast import ChannelsLast
    from fastai.callback.core import Callback
    from fastai.callback.fp16 import MixedPrecision
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper
    from self_supervised.data import no_loss, tensor_dls
    from self_supervised.vision.swav import SWAV
    from self_supervised.whole_images import WholeImageDL
    class Clock(Callback):
        order = 99
        def after_batch(self):
            if self.iter in (1,steps-1):
                torch.cuda.synchronize()
                self.start,self.seconds = time.perf_counter(),(time.perf_counter()-self.start)/(steps-2) if self.iter>1 else 0
    if images=='squares': dls = tensor_dls(squares(bs*steps), bs=bs, device=dev)
    else:
        dl  = WholeImageDL([(o,) for o in whole(bs*steps).images], bs=bs, shuffle=True, drop_last=True, num_workers=8, pin_memory=True, device=dev)
        dls = DataLoaders(dl, dl.new([], shuffle=False, drop_last=False, num_workers=0), device=dev)
    learn = Learner(dls, swav(name), loss_func=no_loss, opt_func=lambda ps,**kw: OptimWrapper(ps, torch.optim.SGD, **kw),
                    cbs=[SWAV(augs(), [0,1], K=None), MixedPrecision(amp_mode=amp), ChannelsLast(), clock:=Clock()])
    def _epoch():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        return clock.seconds
    return _epoch

def limit(name, images, amp, steps):
    "Seconds of a step on views that are ready"
    m     = swav(name)
    ready = ours(_images(images, bs).to(dev))()
    opt,scaler,dtype = torch.optim.SGD(m.parameters(), 1e-3),torch.amp.GradScaler(enabled=amp=='fp16'),torch.bfloat16 if amp=='bf16' else torch.float16
    def _step():
        with torch.autocast('cuda', dtype): loss = m(ready)[1].float().mean()
        scaler.scale(loss).backward(); scaler.step(opt); scaler.update(); opt.zero_grad()
    def _epoch():
        for _ in range(2): _step()
        return card_seconds(lambda: [_step() for _ in range(steps-2)])/(steps-2)
    return _epoch

def steps(cases, n=12, rounds=2):
    "A row of each case, and the part of views in it"
    rows = []
    for name,images,amp in cases:
        forms,views,gb = {},None,{}
        gc.collect(); torch.cuda.empty_cache() # what the case before has left
        def _clock(f):
            torch.cuda.reset_peak_memory_stats()
            before,s = torch.cuda.memory_allocated(),f()
            gb[f] = (torch.cuda.max_memory_allocated()-before)/1e9
            return s
        forms = dict(limit=limit(name, images, amp, n), ours=learner(name, images, amp, n))
        s,r   = paired(forms, rounds, _clock)
        views = ours(_images(images, bs).to(dev))
        v     = median(card_seconds(views) for _ in range(7))
        above = {o: gb[f] for o,f in forms.items()}
        rows.append({'encoder': name, 'images': images, 'precision': amp, 'limit, ms': 1e3*s['limit'], 'ours, ms': 1e3*s['ours'], 'images/s': round(bs/s['ours']), 'ours / limit': r['ours'],
                     'views, ms': 1e3*v, 'views / limit': v/s['limit'], 'limit, GB': above['limit'], 'ours, GB': above['ours'], 'memory / limit': above['ours']/above['limit']})
    return {'Step: 2×224 + 6×96 views, batch 256': rows}

# ---- losses, codes, neighbours

def unit(n, dim=128): return F.normalize(torch.randn(n, dim, device=dev), dim=1)

def grad_of(f, *xs): return torch.autograd.grad(f(*xs), xs)

def losses():
    from self_supervised.sinkhorn import sinkhorn_knopp
    from self_supervised.vision.barlow_twins import barlow_twins_loss
    from self_supervised.vision.simclr import nt_xent_loss
    from self_supervised.vision.swav import swav_loss
    from self_supervised.vision.vicreg import vicreg_loss
    rows = []
    def _row(nm, f): rows.append({'what': nm, 'ms': 1e3*median(card_seconds(f) for _ in range(7)), 'GB above': above(f), 'launches': launches(f)})
    for n in (256,4096):
        _row(f'NT-Xent, 2 views of {n}', partial(grad_of, nt_xent_loss, unit(2*n).requires_grad_()))
        s,q = (.3*torch.randn(8, n, 3000, device=dev)).requires_grad_(),(5*torch.rand(2, n, 3000, device=dev)).softmax(2)
        _row(f'swapped loss, 8 views of {n}, 3000 prototypes', partial(grad_of, lambda s, q=q: swav_loss(s, q, [0,1], .1), s))
        _row(f'Sinkhorn, {n} × 3000, 3 rounds', partial(sinkhorn_knopp, s.detach()[0], .05, 3))
    for nm,f in (('Barlow Twins',barlow_twins_loss), ('VICReg',vicreg_loss)):
        z = torch.randn(2, bs, 8192, device=dev).requires_grad_()
        _row(f'{nm}, 2 views of {bs}, 8192 features', partial(grad_of, f, z))
    return {'Losses and codes': rows}

def neighbours(n=1281167, queries=10000, k=20):
    from self_supervised.neighbors import nearest
    bank = torch.cat([torch.randn(min(2**16, n-i), 2048, device=dev).half() for i in range(0, n, 2**16)])
    q    = torch.randn(queries, 2048, device=dev).half()
    f    = partial(nearest, bank, q, k)
    f()
    s = median(card_seconds(f) for _ in range(3))
    return {'k-NN': [{'bank': f'{n:,} × 2048', 'queries': f'{queries:,}', 's': s, 'TFLOP/s': 2*n*2048*queries/s/1e12, 'GB above': above(f)}]}

if __name__=='__main__':
    if not torch.cuda.is_available():
        print('skipped: benchmarks/gpu.py measures a CUDA card, and PyTorch sees none here (nvidia-smi lists cards, torch.version.cuda says what PyTorch was built for)')
        sys.exit()
    warnings.simplefilter('ignore')
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    cases  = [('ResNet-50','squares','bf16'), ('ResNet-50','whole','bf16'), ('ResNet-50','squares','fp16'), ('ViT-S/16','squares','bf16')]
    tables = {}
    for part in (views, partial(steps, cases), losses, neighbours):
        tables |= part()
        gc.collect(); torch.cuda.empty_cache()
    save('gpu', __doc__.partition('\n\n')[2].strip(), tables, ('timm','kornia'))
