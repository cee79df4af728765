"""What the encoder has learned on Fashion-MNIST: our fast views and torchvision's, ours and lightly, multi-crop and two crops,
queue and none, and the methods that cluster the whole data set. About three quarters of an hour.

Every form trains the same encoder (three convolutions with batch norm, 128 features) on the 5,000 images of the sample, without labels, batch 128
unless its name says otherwise, with fastai's Adam and `fit_one_cycle`; then the encoder is frozen and judged on the 1,000 test images.

- SwAV sees 2 large (28 px, 40 to 100 % of the area) and 4 small views (14 px, 10 to 40 %), SimCLR two large ones. All mirror, change brightness
  and contrast and blur with the same probabilities and strengths; the images are grey, so there is no colour to change, and hue goes untested.
- Projector 128–256–128 with batch norm, 100 prototypes, temperature 0.1. With a queue, 512 projections a view, from a quarter of the training on.
- DeepCluster-v2 and SeLa-v2: the views, projector and temperature of SwAV, three heads of 100 prototypes, an assignment of all images at the start
  of every epoch, and before the first a pass over them to fill the memory, which counts as training.
- torchvision views: the same steps image by image and one after the other, where ours are fused and clamp at the end only.
- lightly: its transforms on PIL images in two worker processes, its heads and its losses, one pass of the encoder a view, as in its examples.
  Encoder, optimiser and schedule are ours. Its prototypes have a bias; ours stay fixed for the first hundredth of the steps.
- as long: once more, with as many epochs as fit into the training time of our SwAV (or SimCLR): the ratio is the median over the seeds, which take turns.
- k-NN: 20 neighbours among the training images. Linear: logistic regression, on ten labels a class (the mean of five draws) and on all.
  Accuracy in %, mean ± standard deviation over seeds: 5 for the first five rows, 3 for the others (fewer with `--seeds`).
- s: seconds of training, the median over seeds. The forms take turns, a seed of each.

The second table has the differences of means, ± their standard error. The test images are the same for all and their number is small: a difference
between forms that is no more than two standard errors says nothing. `--full` takes all 60,000 + 10,000 images, and twelve times as long.
"""
import math, re
from functools import partial
from statistics import mean, median, stdev

import torch
import torchvision.transforms.v2 as tv
from fastcore.script import call_parse
from fastai.vision.all import ConvLayer, DataLoaders, Learner, set_seed
from torch import nn
from torch.nn import functional as F

from measure import save, seconds, table
from self_supervised.all import *

lr,nf,hidden,dim,protos,temp,queue = 8e-3,128,256,128,100,.1,512
large,small  = (28,(.4,1.)),(14,(.1,.4)) # side, and area as a part of the image's
jitter,sigma = .5,(.1,1.)

def new_encoder():
    "1×28×28 → 128 features"
    szs = (1,32,64,nf)
    convs = [ConvLayer(i, o, stride=2) for i,o in zip(szs, szs[1:])]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(memory_format=torch.channels_last)

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
as_long = {'SwAV, lightly': 'SwAV', 'SwAV, two crops': 'SwAV', 'SimCLR, lightly': 'SimCLR'}
questions = [('SwAV','SwAV, torchvision views'), ('SwAV','SwAV, lightly'), ('SwAV','SwAV, lightly, as long'), ('SimCLR','SimCLR, lightly'),
             ('SimCLR','SimCLR, lightly, as long'), ('SwAV','SwAV, two crops'), ('SwAV','SwAV, two crops, as long'),
             ('SwAV','DeepCluster-v2'), ('DeepCluster-v2','SeLa-v2'), ('SwAV, two crops','DeepCluster-v2, two crops'), ('DeepCluster-v2, two crops','SeLa-v2, two crops'),
             ('SwAV, batch 32, queue','SwAV, batch 32')]
columns = 'k-NN','linear, 10 labels a class','linear, all labels'

def judge(encoder, train, test):
    "Accuracies in %, one a column"
    return [100*o.accuracy for o in evaluate(encoder, tensor_dls(train, test, bs=500))]

def run(name, form, epochs, seed, train, test):
    "Seconds of training and what `judge` says"
    set_seed(seed)
    encoder,s = new_encoder(),0.
    if form:
        learn = form(train[0], encoder)
        with learn.no_bar(), learn.no_logging(): s = seconds(lambda: learn.fit_one_cycle(epochs, lr))
    res = judge(encoder, train, test)
    print(f'{name}, seed {seed}: {s:.0f} s,', ', '.join(f'{o:.1f}' for o in res), flush=True)
    return s,*res

def spread(xs): return stdev(xs) if len(xs)>1 else math.nan

def difference(a, b):
    "Of the means of two columns of results, ± the standard error"
    return f'{mean(a)-mean(b):+.1f} ± {(spread(a)**2/len(a)+spread(b)**2/len(b))**.5:.1f}'

@call_parse
def main(
    seeds:int=5, # runs of the first three forms; of the others at most 3
    epochs:int=10, # of pretraining
    full:bool=False, # all of Fashion-MNIST, see `fashion_mnist`
    only:str='', # forms with this regular expression in their name; the tables are printed and not saved
):
    "Train and judge all forms, print the tables and write them to results/"
    data  = fashion_mnist(full)
    names = [o for o in forms if re.search(only, o)]
    n     = {nm: seeds if i<5 else min(seeds, 3) for i,nm in enumerate(forms)}
    runs,ran = {nm: [] for nm in names},{nm: epochs if forms[nm] else 0 for nm in names}
    for seed in range(seeds):
        for nm in names:
            if seed<n[nm]: runs[nm].append(run(nm, forms[nm], epochs, seed, *data))
    for nm,ref in as_long.items():
        if not {nm,ref} <= {*names}: continue
        new = f'{nm}, as long'
        ran[new]  = max(1, round(epochs*median(a[0]/b[0] for a,b in zip(runs[ref], runs[nm]))))
        runs[new] = [run(new, forms[nm], ran[new], seed, *data) for seed in range(n[nm])]
    res = {nm: list(zip(*o)) for nm,o in runs.items()}
    tables = {f'Accuracy on {len(data[1][0]):,} test images, in %':
                  [{'form': nm, 'epochs': ran[nm], 'seeds': len(s), 's': median(s), **{c: f'{mean(o):.1f} ± {spread(o):.1f}' for c,o in zip(columns, accs)}}
                   for nm,(s,*accs) in res.items()],
              'Differences, in percentage points':
                  [{'first': a, 'minus': b, **{c: difference(*o) for c,*o in zip(columns, res[a][1:], res[b][1:])}} for a,b in questions if {a,b}<={*res}]}
    if only: print('\n\n'.join(table(o) for o in tables.values() if o))
    else: save('quality', __doc__.partition('\n\n')[2].strip(), tables, ('lightly','pillow'))
