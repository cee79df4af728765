"""Are views better cut from the whole image than from its centred square? Drawings whose classes differ in fine detail. About forty minutes on one core.

4,000 drawings of at least 320×240 pixels, 4:3, 3:2 and 16:9, a third upright, as JPEG of quality 90; 3,000 to train on without labels, 1,000 to judge on.
In each four objects of one outline and one pattern lie anywhere, on grainy noise; all colours are random. So there are two questions:

- pattern: which of eight (stripes, checks, dots, rings, crosses, a grid, bricks, zigzag) fills them, turned at random. A period is 1/30 to 1/18
  of the shorter side: 5 to 8 pixels in a whole image, 2.4 to 4 in a square. Here whole images should help.
- outline: which of six (disc, square, triangle, ring, cross, star). It is coarse, and any difference would be a side effect.

SimCLR with two views of 64 pixels, the paper's areas (8 to 100 %), temperature 0.1, batch 64, EPOCHS epochs of one cycle with Adam; four convolutions
with batch norm, 128 features; one thread. All views are grey: colours, which are an image's own here, would be enough to tell the images apart. The
blur is the paper's for 224 pixels, in proportion. Both forms take the same steps from the same weights:

- squares: the largest centred square, shrunk to 73 pixels (8/7 of the view), as `image_dls(size=73)` loads it.
- whole images: shrunk to a shorter side of 146 pixels (16/7), as `image_dls(short_side=146)` loads them.

Both are judged on the same images in the same way, by k-NN (20 neighbours) and by logistic regression on frozen features of the 3,000: the centre of
a centred square, 64 pixels out of 73 as in training from squares, and 128 out of 146, where the pattern is plain to see. Accuracy in %, mean ± standard
deviation over seeds; chance is 12.5 and 16.7. The last table has the differences of the means, ± their standard error. s: seconds of training, decoding not
included, beside other jobs.
"""
import io, math
from statistics import mean, median, stdev

import numpy as np
import torch
from fastai.vision.all import ConvLayer, DataLoaders, Learner, imagenet_stats, set_seed
from fastcore.parallel import parallel
from fastcore.script import call_parse
from PIL import Image, ImageDraw
from torch import nn

from measure import photograph, save, seconds
from self_supervised.all import *
from self_supervised.whole_images import WholeImageDL

large,nf     = 64,128
square,short = round(large*8/7),round(large*16/7)

# Patterns: where there is ink, for coordinates in periods
def _mid(u): return u%1-.5
patterns = {'stripes': lambda u,v: u%1<.5,
            'checks':  lambda u,v: (u%1<.5)==(v%1<.5),
            'dots':    lambda u,v: np.hypot(_mid(u), _mid(v))<.38,
            'rings':   lambda u,v: abs(np.hypot(_mid(u), _mid(v))-.32)<.12,
            'crosses': lambda u,v: (np.minimum(abs(_mid(u)), abs(_mid(v)))<.13) & (np.maximum(abs(_mid(u)), abs(_mid(v)))<.4),
            'grid':    lambda u,v: (u%1<.28) | (v%1<.28),
            'bricks':  lambda u,v: (v*1.4%1<.3) | ((.7*u+.5*np.floor(v*1.4))%1<.2),
            'zigzag':  lambda u,v: (v+2*abs(_mid(u)))%1<.5}

star = [(.5+(.5 if i%2==0 else .2)*np.sin(i*np.pi/5), .5-(.5 if i%2==0 else .2)*np.cos(i*np.pi/5)) for i in range(10)]
outlines = {'disc':     [('ellipse', [(0,0),(1,1)], 255)],
            'square':   [('rectangle', [(.06,.06),(.94,.94)], 255)],
            'triangle': [('polygon', [(.5,0),(1,.95),(0,.95)], 255)],
            'ring':     [('ellipse', [(0,0),(1,1)], 255), ('ellipse', [(.3,.3),(.7,.7)], 0)],
            'cross':    [('rectangle', [(.3,0),(.7,1)], 255), ('rectangle', [(0,.3),(1,.7)], 255)],
            'star':     [('polygon', star, 255)]}

def _object(im, pattern, outline, period, rng):
    "Draw one, anywhere"
    n = int(rng.uniform(.35, .55)*min(im.shape[:2]))
    t,l = (int(rng.integers(o-n+1)) for o in im.shape[:2])
    a = rng.uniform(0, np.pi)
    y,x = np.mgrid[:2*n,:2*n]/2/period # two dots a pixel, for smooth edges
    off = rng.uniform(0, 1, 2)
    ink = patterns[pattern](np.cos(a)*x-np.sin(a)*y+off[0], np.sin(a)*x+np.cos(a)*y+off[1])
    mask = Image.new('L', (2*n,2*n))
    for kind,at,fill in outlines[outline]: getattr(ImageDraw.Draw(mask), kind)([(2*n*x,2*n*y) for x,y in at], fill=fill)
    ink,mask = (np.asarray(o, float).reshape(n,2,n,2).mean((1,3))[...,None] for o in (ink, mask))
    while True:
        colors = rng.uniform(0, 255, (2,3))
        if abs(colors.mean(1)@[1,-1])>70: break # a pattern is to be seen in grey as well
    part = im[t:t+n,l:l+n]
    part[:] = part + (ink*colors[0]+(1-ink)*colors[1]-part)*mask/255

def drawing(i):
    "Number `i`: a JPEG in memory, its pattern and its outline"
    rng = np.random.default_rng(i)
    pattern,outline = int(rng.integers(len(patterns))),int(rng.integers(len(outlines)))
    h = int(240*rng.uniform(1, 1.25))
    w = int(h*(4/3,3/2,16/9)[rng.integers(3)]+1)
    if rng.random()<1/3: h,w = w,h
    im = (photograph(h, w, rng)-115)*rng.uniform(.3, .7)+rng.uniform(50, 200, 3)
    period = min(h, w)/rng.uniform(18, 30)
    for _ in range(4): _object(im, list(patterns)[pattern], list(outlines)[outline], period, rng)
    f = io.BytesIO()
    Image.fromarray(im.clip(0, 255).astype(np.uint8)).save(f, 'JPEG', quality=90)
    return f.getvalue(),pattern,outline

def opened(files, **how):
    "Images as `image_dls` opens them"
    return [open_image(io.BytesIO(o), **how) for o in files]

def squares(files, size, crop):
    "Centres of centred squares (B,3,crop,crop)"
    i = (size-crop)//2
    return torch.stack([o[:,i:i+crop,i:i+crop] for o in opened(files, size=size)])

def new_encoder():
    "Images → 128 features"
    szs = (3,16,32,64,nf)
    convs = [ConvLayer(i, o, stride=2) for i,o in zip(szs, szs[1:])]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(memory_format=torch.channels_last)

def loaders(images, bs=64):
    "Of tensors of one size, or of a list of any sizes"
    if isinstance(images, torch.Tensor): return tensor_dls(images, bs=bs)
    dl = WholeImageDL([(o,) for o in images], bs=bs, shuffle=True, drop_last=True, num_workers=0)
    return DataLoaders(dl, dl.new([], shuffle=False, drop_last=False), device='cpu')

def pretrain(images, encoder, epochs, lr):
    learn = Learner(loaders(images), create_simclr_model(encoder, 256, 128, bn=True, n_features=nf), loss_func=no_loss,
                    cbs=SimCLR(get_simclr_aug_pipelines(large, bw_p=1., blur_s=(.1,.6)), temp=.1))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)

def judge(encoder, images, labels, n):
    "Accuracies in % of each question, by k-NN and a linear classifier; the first `n` images are for them to learn from"
    x,_ = extract_features(encoder, [o for o in images.split(250)], stats=imagenet_stats)
    res = []
    for y in labels:
        train,test = (x[:n],y[:n]),(x[n:],y[n:])
        res += [100*knn(train, test).accuracy, 100*linear_probe(train, test).accuracy]
    return res

def spread(xs): return stdev(xs) if len(xs)>1 else math.nan

def difference(a, b):
    "Of the means, ± the standard error"
    return f'{mean(a)-mean(b):+.1f} ± {(spread(a)**2/len(a)+spread(b)**2/len(b))**.5:.1f}'

columns = 'pattern, k-NN','pattern, linear','outline, k-NN','outline, linear'

@call_parse
def main(
    seeds:int=3, # runs of each form
    epochs:int=10, # of pretraining
    lr:float=4e-3, # learning rate, at its highest
    n:int=3000, # drawings to train on
    n_test:int=1000, # to judge on
):
    "Draw, train and judge, print the tables and write them to results/"
    torch.set_num_threads(1)
    files,*labels = zip(*parallel(drawing, range(n+n_test), n_workers=2))
    labels = [torch.tensor(o) for o in labels]
    forms  = {'random encoder': None, 'squares': torch.stack(opened(files[:n], size=square)), 'whole images': opened(files[:n], size=None, short_side=short)}
    at     = {f'{crop} px out of {size}': squares(files, size, crop) for size,crop in ((square,large), (short,2*large))}
    runs,took = {nm: {o: [] for o in at} for nm in forms},{nm: [] for nm in forms}
    for seed in range(seeds):
        for nm,images in forms.items():
            set_seed(seed)
            encoder = new_encoder()
            took[nm].append(0. if images is None else seconds(lambda: pretrain(images, encoder, epochs, lr)))
            for o,x in at.items():
                runs[nm][o].append(judge(encoder, x, labels, n))
                print(nm, seed, f'{took[nm][-1]:.0f} s', o, *(f'{a:.1f}' for a in runs[nm][o][-1]), flush=True)
    runs   = {nm: {o: list(zip(*r)) for o,r in rs.items()} for nm,rs in runs.items()}
    tables = {f'Accuracy on {n_test:,} drawings, in %':
                  [{'views from': nm, 'judged at': o, 's': median(took[nm]), **{c: f'{mean(a):.1f} ± {spread(a):.1f}' for c,a in zip(columns, accs)}}
                   for o in at for nm in forms for accs in [runs[nm][o]]],
              'Whole images minus squares, in percentage points':
                  [{'judged at': o, **{c: difference(a, b) for c,a,b in zip(columns, runs['whole images'][o], runs['squares'][o])}} for o in at]}
    save('whole_images', __doc__.partition('\n\n')[2].strip().replace('EPOCHS', str(epochs)), tables, ('pillow',))
