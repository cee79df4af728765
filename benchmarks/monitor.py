"""What `CollapseMonitor` costs a step, and whether it warns when it should and only then. About half an hour.

The first table: training steps of a fastai Learner with the SWAV callback on the CPU, float32, the first encoders as in the benchmark of the step.

- one check: to look at a batch (loss, codes, projections) and to read what was seen, the median over 40 steps that all have one.
- share: one check in every 20 steps, as by default, as a part of these 20 steps. This is the cost, wherever steps and checks take turns.
- time / without: whole epochs of 20 steps with the monitor against epochs without it, the median ratio of neighbours. It scatters by more than the share.

The second: short runs on the 5,000 images of the Fashion-MNIST sample, their settings drawn at random from those that should work, with seeds that were
not used when the limits were chosen. k-NN: accuracy of 20 nearest neighbours on the 1,000 test images, in %, of the untrained and of the trained encoder.
The third: runs that were made to collapse.
"""
import random, warnings
from functools import partial
from statistics import median

import timm, torch
from fastcore.script import call_parse
from fastai.optimizer import OptimWrapper
from fastai.vision.all import ConvLayer, Learner, NormType, set_seed
from torch import nn

from measure import paired, pictures, save, seconds
from self_supervised.all import *
from step import augs, cases, conv4, swav

# The cost

cost_cases = {nm: cases[nm][0] for nm in ('4 convolutions','ResNet-18')} | {'4 convolutions, tiny': (conv4, 256, 128, 28, (2,4), (28,14))}

def quiet(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kwargs)

class Clock(CollapseMonitor):
    "Notes the seconds that each step takes it"
    def before_fit(self): super().before_fit(); self.spent = []
    def after_loss(self): self.spent.append(seconds(super().after_loss))

def cost(name, steps=20, rounds=3):
    "A row of the first table"
    new,nf,bs,px,counts,sizes = cost_cases[name]
    def _learner(*cbs): return Learner(tensor_dls(pictures(bs*steps, px), bs=bs), swav(new(), nf), cbs=[SWAV(augs(counts, sizes), [0,1], K=None), *cbs],
                                       opt_func=lambda ps,**kw: OptimWrapper(ps, torch.optim.AdamW, **kw))
    forms = {'without': _learner(), 'with': _learner(CollapseMonitor())}
    s,r   = paired({k: partial(quiet, o, 1, 1e-3) for k,o in forms.items()}, rounds)
    timed = _learner(Clock(every=1))
    quiet(timed, 2, 1e-3)
    step,check = s['without']/steps,median(timed.clock.spent)
    return {'encoder': name, 'batch': bs, 'views': f"{' + '.join(f'{c}×{z}' for c,z in zip(counts, sizes))}", 'step, ms': 1e3*step, 'one check, ms': 1e3*check,
            'share, %': 100*check/(steps*step), 'time / without': r['with']}

# False alarms, and alarms

def conv(norm=NormType.Batch): return nn.Sequential(*(ConvLayer(i, o, stride=2, norm_type=norm) for i,o in ((1,32),(32,64),(64,128))), nn.AdaptiveAvgPool2d(1), nn.Flatten())

class Block(nn.Module):
    "Two convolutions and a shortcut, at half the resolution"
    def __init__(self, ni, nf):
        super().__init__()
        self.convs,self.short = nn.Sequential(ConvLayer(ni, nf, stride=2), ConvLayer(nf, nf, act_cls=None)),ConvLayer(ni, nf, ks=1, stride=2, act_cls=None)
    def forward(self, x): return (self.convs(x)+self.short(x)).relu()

class Constant(nn.Module):
    "The same features for every image"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(128))
    def forward(self, x): return self.w.expand(len(x), -1)

encoders = dict(conv=conv, plain=partial(conv, None), constant=Constant,
                resnet=lambda: nn.Sequential(ConvLayer(1, 16), Block(16, 32), Block(32, 64), Block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                vit=lambda: timm.create_model('vit_tiny_patch16_224', img_size=28, patch_size=7, embed_dim=96, depth=4, num_heads=3, in_chans=1, num_classes=0, dynamic_img_size=True))
grey  = dict(jitter_s=.5, bw=False, blur=False, stats=None)
steps = {8:260, 32:300, 64:260, 128:240, 256:220} # at a batch of so many

def run(method='swav', encoder='conv', bs=128, lr=1e-3, cycle=False, bn=True, n_protos=100, K=None, start=.25, crops=(2,), eps=.05, hard=False, seed=0):
    "A run with these settings, k-NN accuracy before and after, and the warning"
    set_seed(seed)
    enc,make = encoders[encoder](),dict(bn=bn, n_features=96 if encoder=='vit' else 128)
    n = len(crops)
    if method=='swav':
        m  = create_swav_model(enc, n_protos=n_protos, **make)
        cb = SWAV(get_swav_aug_pipelines(crops, (28,14)[:n], (.4,.1)[:n], (1.,.4)[:n], **grey), [0,1], K=K, queue_start_pct=start, eps=eps, hard_codes=hard)
    else: m,cb = create_simclr_model(enc, **make),SimCLR(get_simclr_aug_pipelines(28, resize_scale=(.4,1.), **grey), .1)
    train,test = fashion_mnist()
    dls = tensor_dls(train, test, bs=500)
    def _judge(): return 100*knn(extract_features(enc, dls.train), extract_features(enc, dls.valid)).accuracy
    before,learn = _judge(),Learner(tensor_dls(train[0][:bs*steps[bs]//4], bs=bs), m, cbs=[cb, CollapseMonitor()])
    epochs = round(steps[bs]/len(learn.dls.train))
    with learn.no_bar(), learn.no_logging(): (learn.fit_one_cycle if cycle else learn.fit)(epochs, lr)
    h = {k: v[-1] for k,v in learn.collapse_monitor.history.items()}
    return {'k-NN before': before, 'after': _judge(), **{k: h.get(k, '') for k in ('loss-chance','protos','std','rank')}, 'warning': learn.collapse_monitor.warning.partition(':')[0]}

def healthy(seed):
    "Settings that should work"
    r = random.Random(seed)
    o = dict(seed=seed, method=r.choice(['swav']*3+['simclr']), encoder=r.choice(['conv','conv','plain','resnet','vit']), lr=r.choice([1e-4,3e-4,1e-3,3e-3]), cycle=r.random()<.5)
    large = o['encoder'] in ('resnet','vit')
    o |= dict(bs=r.choice([32,64] if large else [32,64,128,256]), bn=o['encoder'] in ('plain','vit') or r.random()<.6) # batch norm in one of the two at least
    if o['method']=='swav': o |= dict(n_protos=r.choice([10,30,100,200,500]), K=r.choice([None,None,4*o['bs'],8*o['bs']]), start=r.choice([.15,.25,.5]),
                                      crops=(2,) if large else r.choice([(2,),(2,2),(2,4)]), hard=r.random()<.25, eps=r.choice([.03,.05,.05]))
    return o

sick = {'constant encoder':                        dict(encoder='constant', bs=32),
        'constant encoder, SimCLR':                dict(encoder='constant', bs=32, method='simclr'),
        'lr 100 times too high':                   dict(encoder='plain', bn=False, bs=32, lr=.3),
        'lr 100 times too high, SimCLR':           dict(encoder='plain', bn=False, bs=32, lr=.3, method='simclr'),
        'lr 100 times too high, batch norm':       dict(bs=32, lr=.3),
        '3,000 prototypes, batch 8':               dict(encoder='plain', bn=False, bs=8, n_protos=3000, crops=(2,4), seed=1),
        '3,000 prototypes, batch 8, batch norm':   dict(bs=8, n_protos=3000, crops=(2,4), seed=1),
        'queue of 64 batches at once, lr 3e-3':    dict(bs=32, K=2048, start=0., lr=3e-3),
        'the queue without batch norm':            dict(bs=32, K=2048, start=0., lr=3e-3, bn=False),
        'no queue, lr 3e-3':                       dict(bs=32, lr=3e-3)}

@call_parse
def main(
    seeds:int=24, # healthy runs
    first:int=200, # seed of the first one
):
    "Print the tables and write them to results/"
    warnings.filterwarnings('ignore') # the monitor's are in the tables
    torch.set_num_threads(1)
    def _run(kwargs):
        res = run(**kwargs)
        print(kwargs, res, flush=True) # it takes long
        return res
    good = [(o,_run(o)) for o in map(healthy, range(first, first+seeds))]
    bad  = [{'run': nm, **_run(o)} for nm,o in sick.items()]
    good = [{'settings': ', '.join(f'{k}={v}' for k,v in o.items()), **res} for o,res in good]
    save('monitor', __doc__.partition('\n\n')[2].strip(), {
        'Cost': [cost(o) for o in cost_cases],
        f'{seeds} runs that should work: {sum(bool(o["warning"]) for o in good)} warnings': good,
        'Runs made to collapse, and the same mended': bad}, ('timm',))
