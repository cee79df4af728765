"""What a whole SwAV training step costs: ours, lightly's, and the limit, a step that need not make views, codes and loss. Ten minutes.

Three encoders in float32 on the CPU, with all threads; a projector with 512 hidden and 128 output features and 512 prototypes without queue,
as in lightly's SwAV example; torch's AdamW for all. Images are in memory as uint8. The forms take turns, an epoch of a few steps each.
Squares are what `image_dls(size=…)` gives. Whole images are 4:3, a third upright, their shorter side 16/7 of the largest view: the largest that
`image_dls` gives without `size`, with 3.9 times as many pixels as these squares.

- ours: `fit` of a fastai Learner with the SWAV callback: fetching images, views, forward, codes, loss, backward, optimiser, callbacks.
- limit: forward, backward and optimiser of the same model on views that are ready, channels-last or contiguous; the loss is the mean score.
- lightly: the loop of its SwAV example, with `SwaVTransform` in 0 or 2 worker processes, `SwaVProjectionHead`, `SwaVPrototypes`, `SwaVLoss`.
- s: seconds a step, those of an epoch divided by its steps, the median of the rounds. Ratios are medians over the rounds too.
- MiB: the highest memory of a run in a process of its own, workers, Python and libraries included, sampled.
- MB a batch: bytes of a batch of images, as it moves to a device.

The last table says where our step spends its seconds, and where the limit does. Run with the argument `compile`, the script compares
the limit for ResNet-18 with and without torch.compile instead: a few minutes, needs a C++ compiler.
"""
import sys, time
from statistics import median

import timm, torch
from torch import nn
from torch.nn import functional as F

from measure import paired, pictures, save, seconds, table, tree_memory

hidden,dim,protos = 512,128,512
scales = ((.14,1.),(.05,.14)) # lightly's defaults

def conv4():
    "Four convolutions"
    szs = (3,32,64,128,256)
    block = lambda i,o: [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
    return nn.Sequential(*(l for o in zip(szs, szs[1:]) for l in block(*o)), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def resnet(n): return lambda: timm.create_model(f'resnet{n}', num_classes=0)

# name: (encoder, its features, batch, px of the images, views, their px), steps an epoch, rounds
cases = {'ResNet-18':      ((resnet(18), 512, 32, 128, (2,6), (96,48)), 2, 5),
         'ResNet-50':      ((resnet(50), 2048, 32, 128, (2,6), (96,48)), 2, 2),
         '4 convolutions': ((conv4, 256, 128, 64, (2,4), (48,24)), 3, 5)}

def adamw(m): return torch.optim.AdamW(m.parameters(), lr=1e-3)

def swav(encoder, nf):
    from self_supervised.vision.swav import create_swav_model
    return create_swav_model(encoder, hidden, dim, protos, n_features=nf)

def augs(counts, sizes):
    from self_supervised.vision.swav import get_swav_aug_pipelines
    return get_swav_aug_pipelines(counts, sizes, *zip(*scales))

def stopwatch(spent):
    "A callback that appends to `spent`, epoch by epoch, the seconds of each part of a step"
    from fastai.callback.core import Callback
    parts = dict(before_batch='images and views', after_pred='forward', after_loss='codes and loss', after_backward='backward', after_step='optimiser')
    class Stopwatch(Callback):
        order = 99 # views are made before
        def __call__(self, event):
            now = time.perf_counter()
            if event=='before_fit': spent.append({o: 0. for o in (*parts.values(),'rest')})
            elif spent: spent[-1][parts.get(event, 'rest')] += now-self.last
            self.last = now
    return Stopwatch()

def square_dls(n, bs, px):
    from self_supervised.data import tensor_dls
    return tensor_dls(pictures(n, px), bs=bs)

def whole_dls(n, bs, short):
    "Pictures of 4:3, a third upright"
    from fastai.data.core import DataLoaders
    from self_supervised.whole_images import WholeImageDL
    ims = [(o[...,:short] if i%3==0 else o[:,:short],) for i,o in enumerate(pictures(n, short*4//3))]
    dl  = WholeImageDL(ims, bs=bs, shuffle=True, drop_last=True, num_workers=0)
    return DataLoaders(dl, dl.new([], shuffle=False, drop_last=False))

def images(form, n, bs, px, sizes):
    "Loaders for the form of ours"
    return whole_dls(n, bs, sizes[0]*16//7) if 'whole' in form else square_dls(n, bs, px)

def ours(form, steps, new, nf, bs, px, counts, sizes, spent):
    "An epoch with our library"
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper
    from self_supervised.data import no_loss
    from self_supervised.vision.swav import SWAV
    learn = Learner(images(form, bs*steps, bs, px, sizes), swav(new(), nf), loss_func=no_loss, opt_func=lambda ps,**kw: OptimWrapper(ps, torch.optim.AdamW, **kw),
                    cbs=[SWAV(augs(counts, sizes), [0,1], K=None), stopwatch(spent)])
    def _epoch():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return _epoch

def limit(steps, new, nf, bs, px, counts, sizes, spent, layout=torch.channels_last, wrap=lambda m: m):
    "An epoch of `steps` steps on views that are ready"
    from self_supervised.pipelines import make_views
    m     = swav(wrap(new().to(memory_format=layout)), nf)
    views = [o.contiguous(memory_format=layout) for o in make_views(augs(counts, sizes), pictures(bs, px))]
    opt   = adamw(m)
    def _epoch():
        spent.append({'forward': 0., 'backward': 0., 'optimiser': 0.})
        for _ in range(steps):
            t = [time.perf_counter()]
            loss = m(views)[1].mean();      t.append(time.perf_counter())
            loss.backward();                t.append(time.perf_counter())
            opt.step(); opt.zero_grad();    t.append(time.perf_counter())
            for k,a,b in zip(spent[-1], t, t[1:]): spent[-1][k] += b-a
    return _epoch

def lightly(steps, new, nf, bs, px, counts, sizes, workers):
    "An epoch with lightly"
    from lightly.loss import SwaVLoss
    from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
    from lightly.transforms import SwaVTransform
    from PIL import Image
    from torch.utils.data import DataLoader, default_collate
    m   = nn.ModuleDict(dict(backbone=new(), head=SwaVProjectionHead(nf, hidden, dim), prototypes=SwaVPrototypes(dim, protos)))
    ims = [Image.fromarray(o.permute(1,2,0).numpy()) for o in pictures(bs*steps, px)]
    tfm,loss_func,opt = SwaVTransform(sizes, counts),SwaVLoss(),adamw(m)
    dl  = DataLoader(ims, bs, shuffle=True, drop_last=True, num_workers=workers, collate_fn=lambda b: default_collate([tfm(o) for o in b]))
    def _scores(x): return m.prototypes(F.normalize(m.head(m.backbone(x)), dim=1))
    def _epoch():
        for views in dl:
            m.prototypes.normalize()
            scores = [_scores(x) for x in views]
            loss_func(scores[:2], scores[2:]).backward()
            opt.step(); opt.zero_grad()
    return _epoch

def memory(form, name):
    "Highest memory of three steps, in MiB"
    return tree_memory(__file__, form, name)/2**20

def megabytes(form, new, nf, bs, px, counts, sizes):
    "Of a batch"
    return images(form, bs, bs, px, sizes).one_batch()[0].numel()/1e6 # uint8; `one_batch` alone makes floats of squares

def compare(name, peers):
    "Rows of the case `name`, with lightly in the forms `peers`; and rows with the parts of ours and of the limit"
    args,steps,rounds = cases[name]
    spent = {o: [] for o in ('ours, squares','ours, whole images','limit, channels-last')}
    forms = {'limit, channels-last': limit(steps, *args, spent['limit, channels-last']), **{o: ours(o, steps, *args, spent[o]) for o in spent if 'ours' in o}}
    if name!='ResNet-50': forms['limit, contiguous'] = limit(steps, *args, [], torch.contiguous_format)
    forms |= {o: lightly(steps, *args, int(o[-9])) for o in peers}
    s,r  = paired(forms, rounds)
    peer = min(peers, key=r.get)
    rows = [{'form': nm, 's': s[nm]/steps, 'images/s': args[2]*steps/s[nm], 'time / limit': r[nm], 'speed / lightly': r[peer]/r[nm],
             'MiB': '' if 'limit' in nm else round(memory(nm, name)), 'MB a batch': megabytes(nm, *args) if 'ours' in nm else ''} for nm in forms]
    part = lambda o: {k: median(e[k] for e in o[1:])/steps for k in o[0]} # the first was the warm-up
    parts = {nm: part(o) for nm,o in spent.items()}
    return rows,peer,[{'encoder': name, 'form': nm, **{k: o.get(k, '') for k in parts['ours, squares']}} for nm,o in parts.items()]

def compiled(steps=2):
    "Compare the limit with and without torch.compile"
    args  = cases['ResNet-18'][0]
    forms = {nm: limit(steps, *args, [], wrap=f) for nm,f in (('eager',lambda m: m),('compiled',torch.compile))}
    first = {nm: seconds(f) for nm,f in forms.items()}
    s,r   = paired(forms, 5)
    print(table([{'form': nm, 's': s[nm]/steps, 'time / eager': r[nm], 's to compile': first[nm]-s[nm]} for nm in forms]))

if __name__=='__main__':
    if sys.argv[1:]==['compile']: compiled(); sys.exit()
    if len(sys.argv)>1: # a process of its own, for its memory
        form,name = sys.argv[1:]
        args = 3,*cases[name][0]
        (ours(form, *args, []) if 'ours' in form else lightly(*args, int(form[-9])))(); sys.exit()
    peers  = both = [f'lightly, {n} workers' for n in (0,2)]
    tables,parts = {},[]
    for nm in cases:
        rows,peer,ps = compare(nm, peers)
        (_,_,bs,px,counts,sizes),*_ = cases[nm]
        tables[f"{nm}, {' + '.join(f'{c}×{z}' for c,z in zip(counts, sizes))} from {px} px, batch {bs}"] = rows
        peers  = [peer] if nm=='ResNet-18' else both # the next one is slow
        parts += ps
    save('step', __doc__.partition('\n\n')[2].strip(), {**tables, 'Seconds of the parts of a step': parts}, ('timm','lightly'))
