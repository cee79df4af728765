"""Which images should get a label? `select` against a random choice. Five minutes.

The images are the 5,000 training images of the embedded sample of Fashion-MNIST. Features are those of three encoders (three convolutions with batch norm, 128 features),
pretrained on them without labels: SwAV of the benchmark of quality, 10 epochs. Of the 5,000, 10 to 200 get their label, for all classes together; a linear classifier
(`linear_probe`) is fitted on their features, and judged on the 1,000 test images. With 10 random labels some classes have none.

- random: as many images drawn at random, ten draws for each encoder.
- typical: `select(features, n)`, five seeds of its clusters for each encoder. k-centre: `select(features, n, how='k-centre')`, which has no seed.
- Accuracy in %, mean ± standard deviation over all draws and encoders. The last column says how many random labels give the accuracy of that many typical ones,
  on the straight lines between the means.
"""
from statistics import mean, stdev

import numpy as np, torch
from fastai.vision.all import set_seed
from fastcore.script import call_parse

from measure import save
from quality import fit, lr, new_encoder, swav
from self_supervised.all import *
from self_supervised.selection import select

counts = 10,20,50,100,200

def features(seed, train, test):
    "Features of both sets by an encoder that saw no labels"
    set_seed(seed)
    encoder = new_encoder()
    fit(swav(train[0], encoder), 10, lr)
    return [extract_features(encoder, tensor_dls(o[0], bs=500, drop_last=False, shuffle=False).train)[0] for o in (train, test)]

def as_many(v, means):
    "How many random labels give the accuracy `v`"
    if v>means[-1]: return f'more than {counts[-1]}'
    if v<means[0]: return f'fewer than {counts[0]}'
    return f'{np.interp(v, means, counts):.0f}'

@call_parse
def main(encoders:int=3): # pretraining runs
    "Train, choose, judge, print the table and write it to results/"
    train,test = fashion_mnist()
    found = {(how,n):[] for how in ('random','typical','k-centre') for n in counts}
    for e in range(encoders):
        x,xt = features(e, train, test)
        def accuracy(ids): return 100*float(linear_probe((x[ids],train[1][ids]), (xt,test[1])))
        for n in counts:
            found['random',n]   += [accuracy(torch.randperm(len(x), generator=torch.Generator().manual_seed(100*e+s))[:n]) for s in range(10)]
            found['typical',n]  += [accuracy(select(x, n, seed=s)) for s in range(5)]
            found['k-centre',n] += [accuracy(select(x, n, how='k-centre'))]
        print(e, {k:round(mean(v), 1) for k,v in found.items()}, flush=True)
    means = [mean(found['random',n]) for n in counts]
    def cell(v): return f'{mean(v):.1f} ± {stdev(v):.1f}' if len(v)>1 else f'{v[0]:.1f}'
    rows = [{'labels':n, **{how:cell(found[how,n]) for how in ('random','typical','k-centre')}, 'random labels for as much as typical':as_many(mean(found['typical',n]), means)} for n in counts]
    save('selection', __doc__.partition('\n\n')[2].strip(), {'Accuracy, %':rows})
