"""Does a folder of 10,000 JPEGs feed the training step? Images a second of `image_dls`, and how long a fit waits for them. Under four minutes.

The pictures have 256 pixels a side and 25 KB; they are written to a temporary folder first, and so are in the system's cache.

- images/s: all batches of 3,200 of the images, decoded and resized to 128 pixels, 32 a batch, nothing trained; from the start of the workers
  to the last batch, and to the first. The limit is Pillow in a plain loop in one process: decode at full size, resize. Medians, the forms take turns.
- step: in a fit of SwAV with the whole folder and the defaults of `image_dls`, ResNet-18, 2×96 + 6×48, batch 32: the median seconds from batch to batch.
- waiting: the part of them between the end of a step and the arrival of the next batch, mean and longest; of the first batch, its seconds.
"""
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from fastai.callback.core import Callback, CancelFitException
from fastai.learner import Learner
from PIL import Image
from self_supervised.data import image_dls
from self_supervised.layers import create_timm_encoder
from self_supervised.vision.swav import SWAV, create_swav_model, get_swav_aug_pipelines

from measure import paired, pictures, save

n,distinct,few,bs = 10_000,200,3200,32

def write(path):
    "The files, in ten folders"
    for i,o in enumerate(pictures(distinct, 256)):
        f = path/str(i%10)/f'{i}_0.jpg'
        f.parent.mkdir(exist_ok=True)
        Image.fromarray(o.permute(1,2,0).numpy()).save(f, quality=85)
        for j in range(1, n//distinct): (f.parent/f'{i}_{j}.jpg').write_bytes(f.read_bytes())

def pillow(fns):
    for f in fns: np.array(Image.open(f).convert('RGB').resize((128,128), Image.Resampling.BILINEAR))

def feed(fns, workers, firsts):
    "An epoch without training; appends the seconds to its first batch to `firsts`"
    dls = image_dls(fns, bs=bs, num_workers=workers)
    def _epoch():
        t = time.perf_counter()
        for i,_ in enumerate(dls.train):
            if not i: firsts.append(time.perf_counter()-t)
    return _epoch

class Waiting(Callback):
    "Times when steps begin (the batch is there) and end; ends the fit after `most` seconds"
    order = -100 # before the views are made
    def __init__(self, most): self.most,self.begins,self.ends = most,[],[]
    def before_train(self): self.ends.append(time.perf_counter())
    def before_batch(self): self.begins.append(time.perf_counter())
    def after_batch(self):
        self.ends.append(time.perf_counter())
        if self.ends[-1]-self.ends[0]>self.most: raise CancelFitException

def fit(path):
    "A row: what a fit waits for"
    model = create_swav_model(create_timm_encoder('resnet18', pretrained=False), n_protos=512)
    dls   = image_dls(path, bs=bs)
    cb    = Waiting(75)
    learn = Learner(dls, model, cbs=[SWAV(get_swav_aug_pipelines(crop_sizes=(96,48)), [0,1], K=None), cb])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    first,*waits = [b-e for e,b in zip(cb.ends, cb.begins)]
    whole = [b-a for a,b in zip(cb.begins, cb.begins[1:])]
    return {'workers': dls.train.fake_l.num_workers, 'steps': len(whole), 'step, s': median(whole), 'images/s': bs*len(whole)/sum(whole),
            'waiting, %': 100*sum(waits)/sum(whole), 'longest, s': max(waits), 'first batch, s': first}

if __name__=='__main__':
    with TemporaryDirectory() as tmp:
        path = Path(tmp)
        write(path)
        fns    = sorted(path.rglob('*.jpg'))[::n//few]
        firsts = {o: [] for o in (0,1,2)}
        forms  = {'limit: Pillow, one process': lambda: pillow(fns), **{f'image_dls, num_workers={o}': feed(fns, o, v) for o,v in firsts.items()}}
        s,r    = paired(forms, 3)
        size   = sum(f.stat().st_size for f in fns)/len(fns)
        rows   = [{'form': nm, 'images/s': len(fns)/s[nm], 'speed / limit': 1/r[nm],
                   's to the first batch': median(firsts[int(nm[-1])]) if nm[-1].isdigit() else ''} for nm in forms]
        save('loader', __doc__.partition('\n\n')[2].strip(), {f'Decoding, {size/1e3:.0f} kB a file': rows, 'Waiting in a fit': [fit(path)]}, ('pillow',))
