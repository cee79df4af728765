"""What a training step of each method costs, against the passes of its networks alone. Five minutes.

ResNet-18 in float32 on the CPU, with all threads, batches of 32 squares of 128 pixels, from memory; two views of 96 pixels, of SwAV and DINO six more
of 48; heads with 512 hidden and 128 output features, 512 prototypes, queues of 1,024; torch's AdamW for all. The forms of a method take turns, an epoch
of a few steps each. Methods that cluster the whole data set once an epoch are measured by `benchmarks/clusters.py`.

- ours: `fit` of a fastai Learner with the callback of the method: fetching images, views, student, teacher, loss, backward, optimiser, the teacher's
  move, callbacks.
- limit: on views that are ready forward of the model, forward of the teacher without gradient, on the views that it sees, backward, optimiser; the
  loss is the mean of what the model returns. Distillation's teacher is another ResNet-18.
- s: seconds a step, those of an epoch divided by its steps, the median of the rounds; the ratio is the median over the rounds too.
"""
import re

import torch
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastcore.script import call_parse

from measure import paired, pictures, save, table
from self_supervised.all import *
from self_supervised.data import no_loss
from self_supervised.pipelines import make_views

bs,px    = 32,128
settings = dict(size=96, n=2, num_crops=(2,6), crop_sizes=(96,48), min_scales=(.14,.05), max_scales=(1.,.14), hidden_size=512, projection_size=128, n_protos=512, K=1024,
                crop_assgn_ids=(0,1), freeze_last_layer=0., freeze_protos_pct=0.)

def new_learner(name, steps):
    "Of the method `name`, for epochs of so many steps"
    own = {} if name!='distill' else dict(teacher='resnet18', teacher_weights=False, projection_size=None)
    ks  = Recipe('', name, epochs=2, warmup_epochs=0.).names
    r   = Recipe('', name, epochs=2, warmup_epochs=0., arch='resnet18', bs=bs, **({k:v for k,v in settings.items() if k in ks} | own))
    x   = pictures(bs*steps, px)
    if ssl_methods()[name].callback.needs_labels: x = x,torch.arange(len(x))%10
    return Learner(tensor_dls(x, bs=bs), r.create_model(r.create_encoder()), loss_func=no_loss, cbs=r.create_callback(),
                   opt_func=lambda ps,**kw: OptimWrapper(ps, torch.optim.AdamW, **kw))

def ours(name, steps):
    "An epoch with the library"
    learn = new_learner(name, steps)
    def _epoch():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return _epoch

def limit(name, steps):
    "As many steps that make neither views nor targets nor loss"
    learn = new_learner(name, steps)
    m,cb  = learn.model.to(memory_format=torch.channels_last).train(),ssl_callback(learn)
    views = [o.contiguous(memory_format=torch.channels_last) for o in make_views(cb.aug_pipelines, pictures(bs, px))]
    opt   = torch.optim.AdamW([o for o in m.parameters() if o.requires_grad], lr=1e-3)
    def _epoch():
        for _ in range(steps):
            pred = m(cb.inputs(views))
            with torch.no_grad(): cb.targets(views)
            (pred[-1] if isinstance(pred, tuple) else pred).mean().backward()
            opt.step(); opt.zero_grad()
    return _epoch

@call_parse
def main(
    only:str='', # methods with this regular expression in their name; the table is printed and not saved
    steps:int=2, # of an epoch
    rounds:int=5, # epochs of each form
):
    "Measure the methods, print the table and write it to results/"
    rows = []
    for name in sorted(o for o,m in ssl_methods().items() if not m.callback.assigns_all and re.search(only, o)):
        s,r = paired(dict(limit=limit(name, steps), ours=ours(name, steps)), rounds)
        rows.append({'method': name, 'limit, s': s['limit']/steps, 'ours, s': s['ours']/steps, 'time / limit': r['ours']})
        print(rows[-1], flush=True)
    if only: print(table(rows))
    else: save('methods', __doc__.partition('\n\n')[2].strip(), {f'ResNet-18, batch {bs}': rows}, ('timm',))
