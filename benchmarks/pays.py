"""When does pretraining pay? Accuracy over labels a class, with and without it, for grey and for coloured pictures. At most twenty minutes on one core.

- Fashion-MNIST: the embedded sample, 5,000 grey images of 28 pixels in 10 classes of 500, and 1,000 to test. Encoder: three convolutions with batch norm, 128 features.
- Clip art: the drawings of Debian's package openclipart-png, most of them in the public domain, fitted into 64 × 64 white pixels. Of images that look the same at 8 × 8 pixels one
  is kept, and 12 folders are the classes (`classes` in the script). They are uneven, so accuracy is balanced. A quarter of each class is to test; all others, also those
  of no class, are there for the pretraining. Encoder: four convolutions with batch norm, 128 features. The data come with `apt-get install openclipart-png`; or
  `apt-get download openclipart-png && dpkg-deb -x openclipart-png_*.deb dir`, and `--folder dir/usr/share/openclipart/png`.

Pretraining: SimCLR without labels, batch 128, fastai's Adam and `fit_one_cycle`, two large views of 40 to 100 % of the area. Then `label_curve`:

- SimCLR: logistic regression on the features of the frozen encoder. random: the same with an encoder that has learned nothing.
- scratch: the whole network from those random weights, on the labelled images only, with Adam for 20 epochs, or more until there were 800 steps, batch 64, one view of
  40 to 100 % of the area.
- Accuracy on the test images in %, mean ± standard deviation over three draws of the labels, the same for all rows. With all labels there is one run of the regression.

In words: a difference within two standard errors, of the draws and of the test images, is not claimed.
"""
from collections import defaultdict
from functools import partial
from pathlib import Path
from warnings import filterwarnings

import numpy as np
import torch
from fastai.vision.all import ConvLayer, Learner, set_seed
from fastcore.script import call_parse
from PIL import Image
from torch import nn

from measure import save, seconds, table
from quality import fit, lr, new_encoder, simclr
from self_supervised.all import *

classes = dict(animals='animals', computers='computer', flags='signs_and_symbols/flags', food='food', games='recreation/games', maps='geography', map_symbols='signs_and_symbols/map_symbols',
               office='office', people='people', shapes='shapes', tools='tools', transportation='transportation') # name: folder
apart   = 'computer/icons','geography/astronomy' # in these folders, and of no class
Image.MAX_IMAGE_PIXELS = None # `picture` looks at the size itself

def picture(path, size=64):
    "RGB, on white; None: too large to be worth it"
    with Image.open(path) as im:
        if im.width*im.height>4e7: return
        im = im.convert('RGBA')
    im.thumbnail((size,size))
    res = Image.new('RGBA', (size,size), 'white')
    res.alpha_composite(im, ((size-im.width)//2, (size-im.height)//2))
    return np.asarray(res.convert('RGB'))

def class_of(name):
    "The number of the class of a file, or None"
    def below(o): return name.startswith(f'{o}/')
    return None if any(map(below, apart)) else next((i for i,o in enumerate(classes.values()) if below(o)), None)

def clip_art(folder):
    "((images, labels) to train on, the same to test on), and images without labels"
    if not folder.is_dir(): raise SystemExit(f'{folder} is not there: apt-get install openclipart-png, or give the folder of its pictures with --folder')
    found,kinds = {},defaultdict(list)
    for f in sorted(folder.rglob('*.png')):
        if f.is_symlink() or (x := picture(f)) is None: continue
        look = (np.asarray(Image.fromarray(x).resize((8,8)))//16).tobytes()
        if look not in found:
            found[look] = x
            kinds[class_of(f.relative_to(folder).as_posix())].append(x)
    def images(xs): return torch.from_numpy(np.stack(xs)).permute(0,3,1,2).contiguous()
    rng,parts = np.random.default_rng(0),([],[])
    for k in range(len(classes)):
        for i,j in enumerate(rng.permutation(len(kinds[k]))): parts[i<len(kinds[k])//4].append((kinds[k][j], k))
    train,test = ((images([x for x,_ in o]), torch.tensor([y for _,y in o])) for o in parts)
    return (train, test), torch.cat([train[0], images(kinds[None])])

def color_encoder():
    "3×64×64 → 128 features"
    szs = 3,16,32,64,128
    return nn.Sequential(*[ConvLayer(i, o, stride=2) for i,o in zip(szs, szs[1:])], nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(memory_format=torch.channels_last)

def color_simclr(x, encoder):
    augs = get_simclr_aug_pipelines(64, resize_scale=(.4,1.), jitter_s=.5, stats=None)
    return Learner(tensor_dls(x, bs=128), create_simclr_model(encoder, 256, 128, bn=True), cbs=SimCLR(augs, .1))

def curve(new, form, epochs, data, unlabelled, seeds, tune_steps):
    "Pretrain, and ask"
    set_seed(0)
    begin = new()
    set_seed(1)
    encoder = new()
    learn = form(unlabelled, encoder)
    print(f'{seconds(lambda: fit(learn, epochs, lr)):.0f} s of pretraining', flush=True)
    return label_curve({'SimCLR':encoder}, tensor_dls(*data, bs=256), seeds=seeds, scratch=begin, random=True, tune_steps=tune_steps, tune=dict(resize_scale=(.4,1.)),
                       show=lambda nm,n,r: print(f'  {nm}, {n or "all"}: {r.cell}', flush=True))

def rows(c):
    "As in its table"
    return [{'encoder':nm, **{'all' if n is None else str(n):c.cell(nm, n) for n in c.counts}} for nm in c]

@call_parse
def main(
    folder:str='/usr/share/openclipart/png', # of the clip art
    seeds:int=3, # draws of the labels
    tune_steps:int=800, # of training whole networks, at least
    epochs:int=10, # of pretraining on Fashion-MNIST
    color_epochs:int=15, # of pretraining on clip art
    only:str='', # fashion or clip; the tables are printed and not saved
):
    "Pretrain and ask, print the tables and write them to results/"
    filterwarnings('ignore', message='few steps of training|after training the loss|.*classes have fewer than')
    sets = {}
    if only!='fashion':
        data,unlabelled = clip_art(Path(folder).expanduser())
        print(f'clip art: {len(data[0][0])} images to train on, {len(data[1][0])} to test, {len(unlabelled)} to pretrain on; a class has {data[0][1].bincount().tolist()}', flush=True)
        sets['Clip art'] = partial(curve, color_encoder, color_simclr, color_epochs, data=data, unlabelled=unlabelled)
    if only!='clip':
        data = fashion_mnist()
        sets = {'Fashion-MNIST':partial(curve, new_encoder, simclr, epochs, data=data, unlabelled=data[0][0]), **sets}
    done   = {nm:f(seeds=seeds, tune_steps=tune_steps) for nm,f in sets.items()}
    tables = {f'{nm}, {"balanced " if c.balanced else ""}accuracy in % over labels a class (all: {c.n_all:.0f} on average)':rows(c) for nm,c in done.items()}
    tables['In words'] = [{'images':nm, 'what was found':o} for nm,c in done.items() for o in c.words()]
    if only: print('\n\n'.join(map(table, tables.values()))); return
    save('pays', __doc__.partition('\n\n')[2].strip(), tables)
