"""What the encoder has learned on Fashion-MNIST: all methods, at equal epochs and in equal time; our fast views and torchvision's, ours and lightly,
multi-crop and two crops, queue and none. About two hours; `--part methods` or `--part forms` is one half.

Every form trains the same encoder (three convolutions with batch norm, 128 features) on the 5,000 images of the sample, without labels, batch 128
unless its name says otherwise, with fastai's Adam and `fit_one_cycle`; then the encoder is frozen and judged on the 1,000 test images.

- SwAV sees 2 large (28 px, 40 to 100 % of the area) and 4 small views (14 px, 10 to 40 %), SimCLR two large ones. All mirror, change brightness
  and contrast and blur with the same probabilities and strengths; the images are grey, so there is no colour to change, and hue goes untested.
- Projector 128–256–128 with batch norm, 100 prototypes, temperature 0.1. With a queue, 512 projections a view, from a quarter of the training on.
- DeepCluster-v2 and SeLa-v2: the views, projector and temperature of SwAV, three heads of 100 prototypes, an assignment of all images at the start
  of every epoch, and before the first a pass over them to fill the memory, which counts as training.
- MoCo v2, MoCo v3, BYOL and SimSiam: SimCLR's views and projector (SimSiam's has 512 outputs and a last batch norm), the papers' predictor, both
  directions. MoCo v2 with 1,024 keys, a teacher of momentum 0.99, temperature 0.2; v3 with 0.98 to 1, BYOL with 0.95 to 1. DINO: SwAV's views, a head of
  2 layers with batch norm, 100 classes, momentum 0.98 to 1, centre. Distillation: one large view, cosines; its teacher is an encoder of twice the width,
  trained before with SimCLR for 10 epochs, which does not count in its seconds.
- Barlow Twins and VICReg: SimCLR's views, three layers of 256; LeJEPA: SwAV's views, 64 projections, λ = 0.05, 256 directions.
- ViT: the same with a vision transformer in place of the convolutions, for the methods made for it: patches of 7 pixels, width 64, 3 blocks of
  4 heads, its class token as features; a learning rate of 2e-3. (Without batch norm in its head DINO learned nothing in so short a run.)
- torchvision views: the same steps image by image and one after the other, where ours are fused and clamp at the end only.
- lightly: its transforms on PIL images in two worker processes, its heads and its losses, one pass of the encoder a view, as in its examples.
  Encoder, optimiser and schedule are ours. Its prototypes have a bias; ours stay fixed for the first hundredth of the steps.
- as long, equal time: once more, with as many epochs as fit into the training time of our SwAV (or SimCLR, where lightly's is compared with it): the ratio
  is the median over the seeds, which take turns.
- k-NN: 20 neighbours among the training images. Linear: logistic regression, on ten labels a class (the mean of five draws) and on all.
  Accuracy in %, mean ± standard deviation over seeds: 5 for the first five forms, 3 for the others and for the methods (fewer with `--seeds`).
- s: seconds of training, the median over seeds. The forms take turns, a seed of each.

The last table has the differences of means, ± their standard error. The test images are the same for all and their number is small: a difference
between forms that is no more than two standard errors says nothing. `--full` takes all 60,000 + 10,000 images, and twelve times as long.
"""
import json, math, re, subprocess
from functools import partial
from statistics import mean, median, stdev

import timm, torch
import torchvision.transforms.v2 as tv
from fastcore.script import call_parse
from fastai.vision.all import ConvLayer, DataLoaders, Learner, set_seed
from torch import nn
from torch.nn import functional as F

from measure import here, save, seconds, table
from self_supervised.all import *

lr,nf,hidden,dim,protos,temp,queue = 8e-3,128,256,128,100,.1,512
large,small  = (28,(.4,1.)),(14,(.1,.4)) # side, and area as a part of the image's
jitter,sigma = .5,(.1,1.)

def new_encoder(width=32):
    "1×28×28 → 128 features, or four times `width`"
    szs = (1,width,2*width,4*width)
    convs = [ConvLayer(i, o, stride=2) for i,o in zip(szs, szs[1:])]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(memory_format=torch.channels_last)

def new_vit():
    "1×28×28, or smaller → 64 features"
    return timm.models.VisionTransformer(28, 7, 1, num_classes=0, embed_dim=64, depth=3, num_heads=4, dynamic_img_size=True)

def augs(counts, build=get_batch_augs):
    "So many large views, and small ones"
    return [build(size, resize_scale=scale, jitter_s=jitter, bw=False, blur_s=sigma, stats=None)
            for n,(size,scale) in zip(counts, (large,small)) for _ in range(n)]

def torchvision_augs(size, jitter_s, blur_s, **kwargs):
    "`get_torchvision_batch_augs`, with the jitter that it leaves out where there are not three channels"
    a,blur = .8*jitter_s,tv.GaussianBlur(2*math.ceil(3*blur_s[1])+1, blur_s)
    each = ApplyTo(tv.Compose([tv.RandomApply([tv.ColorJitter(a, a)], .8), tv.RandomApply([blur])]), per_image=True)
    return get_torchvision_batch_augs(size, jitter=False, blur=False, xtra_tfms=[each], **kwargs)

def swav(x, encoder, bs=128, counts=(2,4), build=get_batch_augs, K=None):
    return Learner(tensor_dls(x, bs=bs), create_swav_model(encoder, hidden, dim, protos), cbs=SWAV(augs(counts, build), [0,1], K=K, temp=temp))

def simclr(x, encoder, bs=128):
    return Learner(tensor_dls(x, bs=bs), create_simclr_model(encoder, hidden, dim, bn=True), cbs=SimCLR(augs((2,)), temp))

def deepcluster(x, encoder, counts=(2,4)):
    return Learner(tensor_dls(x, bs=128), create_deepcluster_model(encoder, hidden, dim, protos), cbs=DeepCluster(augs(counts), temp=temp))

def sela(x, encoder, counts=(2,4)):
    return Learner(tensor_dls(x, bs=128), create_sela_model(encoder, hidden, dim, protos), cbs=SeLa(augs(counts), temp=temp))

def moco(x, encoder, K=1024, m=.99, **kwargs):
    return Learner(tensor_dls(x, bs=128), create_moco_model(encoder, hidden, dim, bn=True, **kwargs), cbs=MOCO(augs((2,)), K, m, .2))

def moco_v3(x, encoder): return moco(x, encoder, None, .98, predictor=True, last_bn=True, predictor_last_bn=not isinstance(encoder, nn.Sequential))

def byol(x, encoder):
    return Learner(tensor_dls(x, bs=128), create_byol_model(encoder, hidden, dim), cbs=BYOL(augs((2,)), .95))

def simsiam(x, encoder):
    return Learner(tensor_dls(x, bs=128), create_simsiam_model(encoder, hidden, 4*dim, nlayers=2, predictor_size=dim), cbs=SimSiam(augs((2,)), fix_predictor_lr=True))

def dino(x, encoder):
    model = create_dino_model(encoder, hidden, dim, protos, bn=True, nlayers=2)
    return Learner(tensor_dls(x, bs=128), model, cbs=DINO(augs((2,4)), tmom_start=.98, freeze_last_layer=.5))

def barlow_twins(x, encoder):
    return Learner(tensor_dls(x, bs=128), create_barlow_twins_model(encoder, hidden, hidden), cbs=BarlowTwins(augs((2,))))

def vicreg(x, encoder):
    return Learner(tensor_dls(x, bs=128), create_vicreg_model(encoder, hidden, hidden), cbs=VICReg(augs((2,))))

def lejepa(x, encoder):
    return Learner(tensor_dls(x, bs=128), create_lejepa_model(encoder, hidden, 64), cbs=LeJEPA(augs((2,4))))

def distill(x, encoder, epochs=10):
    teacher = new_encoder(64)
    fit(simclr(x, teacher), epochs, lr)
    return Learner(tensor_dls(x, bs=128), create_distill_model(encoder, hidden, teacher=teacher), cbs=Distill(augs((1,))))

def lightly_learner(x, model, loss, tfm, bs=128):
    "A Learner whose worker processes make views with `tfm`"
    from PIL import Image
    from torch.utils.data import DataLoader, default_collate
    dl = DataLoader([Image.fromarray(o.numpy()) for o in x[:,0]], bs, shuffle=True, drop_last=True, num_workers=2,
                    collate_fn=lambda b: (default_collate([tfm(o) for o in b]), torch.zeros(len(b)))) # fastai wants a target
    return Learner(DataLoaders(dl, []), model, loss_func=lambda pred,_: loss(pred))

lightly_recipe = dict(cj_strength=jitter, random_gray_scale=0, sigmas=sigma, normalize=None)

def lightly_swav(x, encoder):
    from lightly.loss import SwaVLoss
    from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
    from lightly.transforms import SwaVTransform
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder,self.head,self.prototypes = encoder,SwaVProjectionHead(nf, hidden, dim),SwaVPrototypes(dim, protos)
        def forward(self, views):
            self.prototypes.normalize()
            return [self.prototypes(F.normalize(self.head(self.encoder(o)), dim=1)) for o in views]
    sizes,scales = zip(large, small)
    loss = SwaVLoss(temp)
    return lightly_learner(x, Model(), lambda scores: loss(scores[:2], scores[2:]), SwaVTransform(sizes, (2,4), *zip(*scales), **lightly_recipe))

def lightly_simclr(x, encoder):
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder,self.head = encoder,SimCLRProjectionHead(nf, hidden, dim)
        def forward(self, views): return [self.head(self.encoder(o)) for o in views]
    loss,(size,scale) = NTXentLoss(temp),large
    return lightly_learner(x, Model(), lambda z: loss(*z), SimCLRTransform(size, min_scale=scale[0], **lightly_recipe))

forms = {'random encoder':          None,
         'SwAV':                    swav,
         'DeepCluster-v2':          deepcluster,
         'SeLa-v2':                 sela,
         'SwAV, torchvision views': partial(swav, build=torchvision_augs),
         'SwAV, lightly':           lightly_swav,
         'SwAV, two crops':         partial(swav, counts=(2,)),
         'DeepCluster-v2, two crops': partial(deepcluster, counts=(2,)),
         'SeLa-v2, two crops':      partial(sela, counts=(2,)),
         'SwAV, batch 32':          partial(swav, bs=32),
         'SwAV, batch 32, queue':   partial(swav, bs=32, K=queue),
         'SimCLR':                  simclr,
         'SimCLR, lightly':         lightly_simclr}
methods = {'random encoder': None, 'SwAV': swav, 'SimCLR': simclr, 'DeepCluster-v2': deepcluster, 'SeLa-v2': sela, 'MoCo v2': moco, 'MoCo v3': moco_v3, 'BYOL': byol,
           'SimSiam': simsiam, 'DINO': dino, 'Distillation': distill, 'Barlow Twins': barlow_twins, 'VICReg': vicreg, 'LeJEPA': lejepa}
vits    = 'random encoder','MoCo v3','DINO' # made for them
as_long = {'SwAV, lightly': 'SwAV', 'SwAV, two crops': 'SwAV', 'SimCLR, lightly': 'SimCLR'}
questions = [('SwAV','SwAV, torchvision views'), ('SwAV','SwAV, lightly'), ('SwAV','SwAV, lightly, as long'), ('SimCLR','SimCLR, lightly'),
             ('SimCLR','SimCLR, lightly, as long'), ('SwAV','SwAV, two crops'), ('SwAV','SwAV, two crops, as long'),
             ('SwAV','DeepCluster-v2'), ('DeepCluster-v2','SeLa-v2'), ('SwAV, two crops','DeepCluster-v2, two crops'), ('DeepCluster-v2, two crops','SeLa-v2, two crops'),
             ('SwAV, batch 32, queue','SwAV, batch 32')]
columns = 'k-NN','linear, 10 labels a class','linear, all labels'

def judge(encoder, train, test):
    "Accuracies in %, one a column"
    return [100*o.accuracy for o in evaluate(encoder, tensor_dls(train, test, bs=500))]

def fit(learn, epochs, lr):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)

def run(name, form, epochs, seed, train, test, new=new_encoder, lr=lr):
    "Seconds of training and what `judge` says"
    set_seed(seed)
    encoder,s = new(),0.
    if form:
        learn = form(train[0], encoder)
        s = seconds(lambda: fit(learn, epochs, lr))
        if ssl_callback(learn): encoder = encoder_of(learn)
    res = judge(encoder, train, test)
    print(f'{name}, seed {seed}: {s:.0f} s,', ', '.join(f'{o:.1f}' for o in res), flush=True)
    return s,*res

def in_turns(forms, n, epochs, data, **kwargs):
    "Runs of each form, {name: [run, …]}: `n` of them a form, a seed of each in turn"
    res = {nm: [] for nm in forms}
    for seed in range(max(n.values())):
        for nm,form in forms.items():
            if seed<n[nm]: res[nm].append(run(nm, form, epochs, seed, *data, **kwargs))
    return res

def fitting(runs, ref, epochs):
    "As many epochs as fit into the time of `ref`"
    return max(1, round(epochs*median(a[0]/b[0] for a,b in zip(ref, runs))))

def spread(xs): return stdev(xs) if len(xs)>1 else math.nan

def difference(a, b):
    "Of the means of two columns of results, ± the standard error"
    return f'{mean(a)-mean(b):+.1f} ± {(spread(a)**2/len(a)+spread(b)**2/len(b))**.5:.1f}'

def cells(runs, prefix=''):
    return {f'{prefix}{c}': f'{mean(o):.1f} ± {spread(o):.1f}' for c,o in zip(columns, list(zip(*runs))[1:])}

def all_methods(seeds, epochs, data, only):
    "A row a method: equal epochs, equal time, and a vision transformer"
    chosen  = {nm:f for nm,f in methods.items() if re.search(only, nm)}
    n       = dict.fromkeys(chosen, min(seeds, 3))
    runs    = in_turns(chosen, n, epochs, data)
    vit     = in_turns({nm:f for nm,f in chosen.items() if nm in vits}, n, epochs, data, new=new_vit, lr=2e-3) if n.keys()&vits else {}
    res     = []
    for nm,form in chosen.items():
        ran  = fitting(runs[nm], runs['SwAV'], epochs) if form and 'SwAV' in runs else epochs
        more = runs[nm] if ran==epochs else [run(f'{nm}, {ran} epochs', form, ran, seed, *data) for seed in range(n[nm])]
        res.append({'method': nm, 'seeds': n[nm], 's': median(o[0] for o in runs[nm]), **cells(runs[nm]), 'epochs': ran if form else 0, **cells(more, 'equal time: '),
                    **(cells(vit[nm], 'ViT: ') if nm in vit else {f'ViT: {c}': '' for c in columns})})
    return {f'{epochs} epochs, accuracy on {len(data[1][0]):,} test images, in %': res}

def all_forms(seeds, epochs, data, only):
    "A row a form, and the differences between them"
    chosen = {nm:f for nm,f in forms.items() if re.search(only, nm)}
    n      = {nm: seeds if i<5 else min(seeds, 3) for i,nm in enumerate(forms) if nm in chosen}
    runs,ran = in_turns(chosen, n, epochs, data),{nm: epochs if forms[nm] else 0 for nm in chosen}
    for nm,ref in as_long.items():
        if not {nm,ref} <= {*chosen}: continue
        new = f'{nm}, as long'
        ran[new]  = fitting(runs[nm], runs[ref], epochs)
        runs[new] = [run(new, forms[nm], ran[new], seed, *data) for seed in range(n[nm])]
    accs = {nm: list(zip(*o))[1:] for nm,o in runs.items()}
    return {f'accuracy on {len(data[1][0]):,} test images, in %':
                [{'form': nm, 'epochs': ran[nm], 'seeds': len(o), 's': median(s for s,*_ in o), **cells(o)} for nm,o in runs.items()],
            'differences, in percentage points':
                [{'first': a, 'minus': b, **{c: difference(*o) for c,*o in zip(columns, accs[a], accs[b])}} for a,b in questions if {a,b}<={*accs}]}

@call_parse
def main(
    seeds:int=5, # runs of the first forms; of the others, and of methods, at most 3
    epochs:int=10, # of pretraining
    full:bool=False, # all of Fashion-MNIST, see `fashion_mnist`
    part:str='', # methods or forms; the tables of the other part stay as they are
    only:str='', # those with this regular expression in their name; the tables are printed and not saved
):
    "Train and judge, print the tables and write them to results/"
    data   = fashion_mnist(full)
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
    tables = {f'{nm.capitalize()}, at commit {commit}: {h}': rows for nm,f in dict(methods=all_methods, forms=all_forms).items() if part in ('',nm)
              for h,rows in f(seeds, epochs, data, only).items()}
    if only: print('\n\n'.join(table(o) for o in tables.values() if o)); return
    old = json.loads((here/'results'/'quality.json').read_text())['tables'] if part else {}
    save('quality', __doc__.partition('\n\n')[2].strip(), tables | {h:o for h,o in old.items() if not h.lower().startswith(part)}, ('lightly','pillow'))
