"""Does a folder of 10,000 JPEGs feed the training step? Images a second of `image_dls`, whole or as squares, and how long a fit waits for them.
Six minutes.

The pictures have 256 pixels a side and 25 KB; they are written to a temporary folder first, and so are in the system's cache.

- images/s: all batches of 3,200 of the images, decoded and resized to 128 pixels, 32 a batch, nothing trained; from the start of the workers
  to the last batch, and to the first. The limit is Pillow in a plain loop in one process: decode at full size, resize. Medians, the forms take turns.
- whole images: photographs, that is noise with an amplitude of 1/frequency, a third of them upright, as JPEG of quality 90, 32 a batch in one process.
  Whole: a shorter side of 512 pixels at most, `image_dls` without `size`; squares: `size=256`. Both are for views of 224 pixels.
- bytes of a batch of 64 photographs of 500×375, a third upright; one of them replaced by a panorama of 4000×500, of which a window of 3:1 is taken,
  or all of it with `max_aspect=8`. Packed is what moves to a device; padded is what it would be if all were given the largest height and width.
- step: in a fit of SwAV with the folder of 10,000 and squares of 128 pixels, ResNet-18, 2×96 + 6×48, batch 32: the median seconds
  from batch to batch.
- waiting: the part of them between the end of a step and the arrival of the next batch, mean and longest; of the first batch, its seconds.
"""
import time
from functools import partial
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

from measure import paired, photograph, pictures, save

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
    dls = image_dls(fns, bs=bs, num_workers=workers, size=128)
    def _epoch():
        t = time.perf_counter()
        for i,_ in enumerate(dls.train):
            if not i: firsts.append(time.perf_counter()-t)
    return _epoch

def photographs(path, width, height, n=16):
    "Files, every third upright"
    rng,path = np.random.default_rng(0),path/f'{width}x{height}'
    path.mkdir()
    for i in range(n): Image.fromarray(photograph(*((width,height) if i%3==0 else (height,width)), rng)).save(path/f'{i:02}.jpg', quality=90)
    return sorted(path.iterdir())

def decoding(path, width, height, times):
    "Rows: whole images and squares of the same files, read `times` over"
    fns   = photographs(path, width, height)*times
    dls   = {nm: image_dls(fns, bs=bs, num_workers=0, drop_last=False, **o) for nm,o in (('squares', dict(size=256)), ('whole images', {}))}
    s,r   = paired({nm: partial(list, o.train) for nm,o in dls.items()}, 5)
    about = {'photographs': f'{width}×{height}', 'kB a file': sum(f.stat().st_size for f in fns)/len(fns)/1e3}
    return [{**about, 'form': nm, 'images/s': len(fns)/s[nm], 'speed / squares': 1/r[nm], 'pixels an image': o.one_batch()[0].numel()//(3*bs)} for nm,o in dls.items()]

def bytes_of(name, fns, **kwargs):
    "A row: what a batch of `fns` has, and would have"
    x = image_dls(fns, bs=len(fns), num_workers=0, **kwargs).one_batch()[0]
    pixels,padded = (3*int(o) for o in (x.sizes.prod(1).sum(), len(x)*x.sizes.amax(0).prod()))
    return {'batch': name, 'pixels, MB': pixels/1e6, 'packed, MB': x.pixels.nbytes/1e6, 'padded, MB': padded/1e6,
            'packed / pixels': x.pixels.nbytes/pixels, 'padded / pixels': padded/pixels}

def batches(path):
    "Rows: bytes of batches"
    fns,pano = photographs(path, 500, 375, 64),path/'panorama.jpg'
    Image.fromarray(photograph(500, 4000, np.random.default_rng(1))).save(pano, quality=90)
    return [bytes_of('64 photographs', fns), bytes_of('63 and a panorama', [*fns[:-1],pano]), bytes_of('63 and a panorama, max_aspect=8', [*fns[:-1],pano], max_aspect=8)]

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
    dls   = image_dls(path, size=128, bs=bs)
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
        plain  = [{'form': nm, 'images/s': len(fns)/s[nm], 'speed / limit': 1/r[nm],
                   's to the first batch': median(firsts[int(nm[-1])]) if nm[-1].isdigit() else ''} for nm in forms]
        waits  = fit(path)
    with TemporaryDirectory() as tmp:
        path = Path(tmp)
        tables = {f'Decoding, {size/1e3:.0f} kB a file': plain, 'Whole images and squares': decoding(path, 500, 375, 12) + decoding(path, 1600, 1200, 4)}
    with TemporaryDirectory() as tmp: tables['Bytes of a batch'] = batches(Path(tmp))
    save('loader', __doc__.partition('\n\n')[2].strip(), {**tables, 'Waiting in a fit': [waits]}, ('pillow',))
