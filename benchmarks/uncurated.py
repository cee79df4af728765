"""Does pretraining on images that nobody has chosen beat starting from nothing? A miniature of section 5.7 of the SwAV paper. Fifteen minutes.

Two sets of 5,000 grey images of 28 pixels for pretraining without labels, streamed from archives with a buffer of 1,000, 390 steps of 128 images each:

- chosen: the training images of the embedded sample of Fashion-MNIST, 500 of each class.
- not chosen: the same number of images, of which 20 % are noise, and a tenth copies of another one, moved by a pixel and a little brighter. The others are of the same sample, but of
  class c there are as many as 1/(c+1) of those of class 0 (Zipf), drawn with repetition where the sample has fewer.

Views, encoder (three convolutions with batch norm, 128 features), projector, optimiser and schedule are those of the benchmark of quality; SimCLR and SwAV.
Then the encoder is judged as there: k-NN and a linear classifier on all 5,000 labelled images and on ten labels a class, 1,000 test images. Fine-tuned: on ten labels a class,
20 epochs or more until there were 200 steps. Random: the encoder as it begins; its fine-tuning is training from nothing. Accuracy in %, mean ± standard deviation over seeds.
The last table has the differences from the random encoder, ± their standard error.
"""
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import numpy as np
from fastai.vision.all import set_seed
from fastcore.script import call_parse
from PIL import Image
from warnings import filterwarnings

from measure import save
from quality import difference, fit, judge, lr, new_encoder, simclr, spread, swav
from self_supervised.all import *
from self_supervised.shards import write_shards
from self_supervised.streams import stream_dls

n,columns = 5000,('k-NN','linear, 10 labels a class','linear, all labels','fine-tuned, 10 labels a class')

def not_chosen(x, y, rng):
    noise,copies = n//5,n//10
    ps   = 1/(1+np.arange(10))
    kind = rng.choice(10, n-noise-copies, p=ps/ps.sum())
    some = np.stack([x[rng.choice(np.flatnonzero(y==k))] for k in kind])
    of   = some[rng.integers(0, len(some), copies)]
    near = np.clip(np.roll(of, 1, axis=2)*1.05, 0, 255).astype(np.uint8)
    return np.concatenate([some, near, rng.integers(0, 256, (noise,28,28), dtype=np.uint8)])

def write(path, x):
    "As archives"
    (path/'files').mkdir(parents=True)
    for i,o in enumerate(x): Image.fromarray(o).save(path/'files'/f'{i}.png')
    write_shards(path/'files', path/'shards', per_shard=500)
    return path/'shards'

def run(form, shards, seed, data):
    "Accuracies in %, one a column"
    set_seed(seed)
    encoder = new_encoder()
    if form:
        learn = form(data[0][0], encoder)
        learn.dls = stream_dls(shards, bs=128, n_in=1, size=28, shuffle=1000, seed=seed, device='cpu')
        fit(learn, 10, lr)
    return [*judge(encoder, *data), 100*float(fine_tune(encoder, tensor_dls(*data, bs=100), n_per_class=10, resize_scale=(.4,1.)))]

@call_parse
def main(seeds:int=3): # runs of each form
    "Train, judge, print the tables and write them to results/"
    filterwarnings('ignore', message='few steps of training|after training the loss|pass . of the stream')
    data,res = fashion_mnist(),{}
    x,y = data[0][0][:,0].numpy(),data[0][1].numpy()
    for seed in range(seeds):
        with TemporaryDirectory() as d:
            sets = {'chosen':write(Path(d)/'a', x), 'not chosen':write(Path(d)/'b', not_chosen(x, y, np.random.default_rng(seed)))}
            for nm,form,shards in [('random',None,None), *((f'{m}, {k}',f,s) for m,f in dict(SimCLR=simclr, SwAV=swav).items() for k,s in sets.items())]:
                res.setdefault(nm, []).append(run(form, shards, seed, data))
                print(nm, seed, res[nm][-1], flush=True)
    tables = {'Accuracy, %': [{'pretraining':nm, 'seeds':len(o), **{c:f'{mean(v):.1f} ± {spread(v):.1f}' for c,v in zip(columns, zip(*o))}} for nm,o in res.items()],
              'Minus the random encoder, in percentage points': [{'pretraining':nm, **{c:difference(a, b) for c,a,b in zip(columns, zip(*o), zip(*res['random']))}} for nm,o in res.items() if nm!='random']}
    save('uncurated', __doc__.partition('\n\n')[2].strip(), tables)
