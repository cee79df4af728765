"""What labels give while an encoder is pretrained, if it is fine-tuned with the same labels afterwards: SupCon against SwAV and SimCLR, which do not look at
them, with 1 %, 10 % and 100 % of the labels of the Fashion-MNIST sample. About half an hour.

Every form trains the encoder of the benchmark of quality (three convolutions with batch norm, 128 features) on all 5,000 images, batch 128, with fastai's Adam and
`fit_one_cycle`, for equal epochs; views, projectors and temperatures are those there: SwAV sees 2 large and 4 small views, the others two large ones.

- share: the part of each class that has a label, drawn anew for every seed and the same for all forms; the other images are there without.
- SupCon, all: SimCLR's term on all images, and that of the labels, λ = 1. SupCon, only: SimCLR's term on the images without a label only; with 100 % there are
  none, and it is the paper's method.
- fine-tuned: encoder and a linear layer, on the labelled images, with Adam for 20 epochs, or more until there were 200 steps (`fine_tune` with `n_per_class`).
  Linear: logistic regression on the features of these images, the encoder frozen.
- Accuracy on the 1,000 test images in %, mean ± standard deviation over seeds; none: the same, from random weights. s: seconds of pretraining, the median.

The last table has the differences from SwAV of the means, ± their standard error: one that is no more than two of these says nothing.
"""
import re
from functools import partial
from statistics import mean, median
from warnings import filterwarnings

import torch
from fastai.vision.all import Learner, set_seed
from fastcore.script import call_parse

from measure import save, seconds, table
from quality import augs, difference, dim, fit, hidden, lr, new_encoder, simclr, spread, swav, temp
from self_supervised.all import *

unknown = 10 # the class of images without a label

def supcon(x, given, encoder, method):
    model = create_supcon_model(encoder, hidden, dim, bn=True)
    return Learner(tensor_dls((x,given), bs=128), model, cbs=SupCon(augs((2,)), unknown, method, temp=temp))

forms = {'none':   None,
         'SwAV':   lambda x, given, encoder: swav(x, encoder),
         'SimCLR': lambda x, given, encoder: simclr(x, encoder),
         'SupCon, all':  partial(supcon, method='all'),
         'SupCon, only': partial(supcon, method='only')}
shares = {'1 %':.01, '10 %':.1, '100 %':1.}
judges = 'fine-tuned','linear'

def judge(encoder, labelled, test, epochs):
    "Accuracies in %, one a judge"
    dls  = tensor_dls(labelled, test, bs=min(500, len(labelled[0])))
    most = int(labelled[1].bincount().max())
    return [100*float(o) for o in (fine_tune(encoder, dls, n_per_class=most, epochs=epochs, resize_scale=(.4,1.)), linear_probe(encoder, dls))]

def run(name, seed, epochs, tune_epochs, data):
    "For each share the seconds of pretraining and what `judge` says; what does not look at labels is pretrained once"
    (x,y),test = data
    form,res,encoder,s = forms[name],{},None,0.
    for share,pct in shares.items():
        ids   = sample_per_class((torch.arange(len(y)),y), seed=seed, pct=pct)[0]
        given = torch.full_like(y, unknown)
        given[ids] = y[ids]
        if encoder is None or 'SupCon' in name:
            set_seed(seed)
            encoder = new_encoder()
            if form:
                learn = form(x, given, encoder)
                s = seconds(lambda: fit(learn, epochs, lr))
        res[share] = s,*judge(encoder, (x[ids],y[ids]), test, tune_epochs)
        print(f'{name}, {share} of the labels ({len(ids)}), seed {seed}: {s:.0f} s,', ', '.join(f'{o:.1f}' for o in res[share][1:]), flush=True)
    return res

def cells(runs, i): return {share: f'{mean(o):.1f} ± {spread(o):.1f}' for share in shares for o in [[r[share][i] for r in runs]]}

def differences(a, b):
    return {f'{nm}, {share}': difference(*([r[share][i] for r in o] for o in (a,b))) for i,nm in enumerate(judges, 1) for share in shares}

@call_parse
def main(
    seeds:int=3, # runs of each form
    epochs:int=10, # of pretraining
    tune_epochs:int=None, # of fine-tuning; default: 20, or more until there were 200 steps
    only:str='', # forms with this regular expression in their name
    dry:bool=False, # print the tables and do not save them
):
    "Train and judge, print the tables and write them to results/"
    filterwarnings('ignore', message='few steps of training|after training the loss|.*classes have fewer than')
    data,names = fashion_mnist(),[nm for nm in forms if re.search(only, nm)]
    runs = {nm: [] for nm in names}
    for seed in range(seeds):
        for nm in names: runs[nm].append(run(nm, seed, epochs, tune_epochs, data))
    tables = {f'{what}, {epochs} epochs of pretraining': [{'pretraining': nm, 'seeds': len(o), 's': median(r['100 %'][0] for r in o), **cells(o, i)} for nm,o in runs.items()]
              for i,what in enumerate(judges, 1)}
    if 'SwAV' in runs and len(runs)>1: tables['Differences from SwAV, in percentage points'] = [{'pretraining': nm, **differences(o, runs['SwAV'])} for nm,o in runs.items() if nm!='SwAV']
    if dry or only: print('\n\n'.join(table(o) for o in tables.values())); return
    save('labels', __doc__.partition('\n\n')[2].strip(), tables)
