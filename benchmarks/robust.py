"""How often a method fails, instead of how good its best run is: the small recipe of each over batches, learning rates and views, one seed each. About an hour.

- Training: the recipe's optimiser, schedule, weight decay, projector and loss, for 12 epochs on 1,000 images of the embedded sample of Fashion-MNIST.
  Encoder: three convolutions with batch norm and 128 features, as in the benchmark of quality, in place of the recipe's, which costs ten times as much.
- Batch 16, 32, 64, 256. Learning rate: what `Recipe.new` makes of the recipe's for that batch (with Adam the square root of the ratio), ÷4, ×1 and ×4.
- Views: two of 28 pixels, or these and four of 14 pixels (10 to 40 % of the area), distorted as the large ones.
- Judged on 1,000 test images: k-NN with 20 neighbours among all 5,000 training images, and logistic regression on ten labels a class (the mean of five draws).
  Above: runs whose encoder is better than the untrained one, which is the same for all, by both. Worst, median and best: accuracy of the regression in %.
  Not finite: runs whose features are not numbers; they count as below, and have no accuracy.
- SupCon sees the labels of the 1,000 images, so its accuracies are not to be compared with those of others.
"""
import itertools, re
from statistics import median

import torch
from fastai.vision.all import set_seed
from fastcore.script import call_parse

from measure import save, table
from quality import new_encoder
from self_supervised.all import *

axes = dict(batch=(16,32,64,256), lr=('÷4','×1','×4'), views=('two','multi-crop'))
factor = dict(zip(axes['lr'], (1/4,1,4)))

def first_encoder():
    set_seed(0)
    return new_encoder()

def learner(name, batch, lr, views, x, y, epochs):
    "The recipe for the cell of the grid, and its Learner"
    r    = get_recipe(name, bs=batch, epochs=epochs)
    many = 'num_crops' in r.names
    r    = r.new(**{k:factor[lr]*getattr(r, k) for k in ('lr','lr_start','lr_final')}, **(dict(num_crops=(2,4) if views=='multi-crop' else (2,)) if many else {}))
    learn = r.learner(tensor_dls((x,y) if ssl_methods()[r.method].callback.needs_labels else x, bs=batch), first_encoder())
    if views=='multi-crop' and not many:
        small = r.new(size=14, resize_scale=(.1,.4))
        ssl_callback(learn).aug_pipelines += [o for _ in range(2) for o in small.create_callback(1).aug_pipelines]
    return r,learn

def judge(encoder, dls):
    "Accuracies in %, k-NN and on few labels; none if a weight is no number"
    if not all(o.isfinite().all() for o in encoder.state_dict().values()): return None
    return [100*o.accuracy for o in (knn(encoder, dls), linear_probe(encoder, dls, n_per_class=10, seeds=5))]

def run(name, batch, lr, views, n_images, epochs, data):
    "What `judge` says after training"
    (x,y),_ = data
    r,learn = learner(name, batch, lr, views, x[:n_images], y[:n_images], epochs)
    with learn.no_bar(), learn.no_logging(): r.fit(learn)
    res = judge(encoder_of(learn), tensor_dls(*data, bs=500))
    print(f'{name}, batch {batch}, lr {lr}, {views}:', res and ', '.join(f'{o:.1f}' for o in res), flush=True)
    return res

def row(name, runs, before):
    "`runs`: {(batch, lr, views): accuracies}"
    def above(axis=None, value=None):
        rs = [o for k,o in runs.items() if axis is None or k[list(axes).index(axis)]==value]
        return f'{sum(o is not None and all(a>b for a,b in zip(o, before)) for o in rs)}/{len(rs)}'
    accs = [o[1] for o in runs.values() if o]
    return {'recipe':name, 'above':above(), 'not finite':len(runs)-len(accs), 'worst':min(accs), 'median':median(accs), 'best':max(accs),
            **{f'{axis} {o}':above(axis, o) for axis,os in axes.items() for o in os}}

@call_parse
def main(
    n_images:int=1000, # to train on
    epochs:int=12, # of each run
    only:str='', # recipes with this regular expression in their name
    dry:bool=False, # print the table and do not save it
):
    "Train and judge, print the table and write it to results/"
    torch.set_num_threads(1)
    data   = fashion_mnist()
    before = judge(first_encoder(), tensor_dls(*data, bs=500))
    rows = [row(nm, {k:run(nm, *k, n_images, epochs, data) for k in itertools.product(*axes.values())}, before)
            for nm in sorted(recipes()) if nm.endswith('_small') and re.search(only, nm)]
    tables = {f'Untrained: k-NN {before[0]:.1f}, on ten labels a class {before[1]:.1f}': rows}
    if dry or only: print(table(rows)); return
    save('robust', __doc__.partition('\n\n')[2].strip(), tables)
