"""What the views of 32 images cost: ours, lightly's, torchvision's, kornia's and fastai's, and how ours grows. Under four minutes.

All make the same views, 2 large and 6 small ones of each image, with one recipe (that of lightly's `SwaVTransform`): crop, mirror image, colour
jitter, grey, blur, normalisation. Images are in memory, as uint8 tensors, for lightly as PIL images. Kornia's crops are not antialiased,
and fastai's colour changes are not torchvision's.

- ms: wall time of the 32 × 8 views, the median of several rounds in which the forms take turns. One thread, unless the form says otherwise.
- images/s per core: images made into 8 views, divided by the threads in use.
- times lightly: lightly's time by theirs, the median over the rounds.
- MiB above: the highest memory above the images and the views, in a process of its own.

The second table changes one thing at a time: images a batch, size of images and views, views of an image.
"""
import json, sys

import torch

from measure import alone, paired, peak_memory, pictures, save

counts,scales = (2,6),((.14,1.),(.05,.14)) # lightly's defaults
settings = {'2×224 + 6×96 from 256 px': (256,(224,96)), '2×96 + 6×48 from 128 px': (128,(96,48))}
bs,cores = 32,torch.get_num_threads()

def ours(x, sizes, counts=counts):
    from self_supervised.pipelines import make_views
    from self_supervised.vision.swav import get_swav_aug_pipelines
    augs = get_swav_aug_pipelines(counts, sizes, *zip(*scales))
    return lambda: make_views(augs, x)

def lightly(x, sizes):
    from lightly.transforms import SwaVTransform
    from PIL import Image
    ims,tfm = [Image.fromarray(o.permute(1,2,0).numpy()) for o in x],SwaVTransform(sizes)
    return lambda: [torch.stack(o) for o in zip(*map(tfm, ims))]

def peer(name):
    "The form of `get_{name}_batch_augs`"
    def _form(x, sizes):
        from self_supervised import augmentations
        build = getattr(augmentations, f'get_{name}_batch_augs')
        augs = [build(size, resize_scale=scale) for size,scale,n in zip(sizes, scales, counts) for _ in range(n)]
        return lambda: [o(x) for o in augs]
    return _form

forms = {'lightly': lightly, 'ours': ours, 'torchvision, image by image': peer('torchvision'), 'kornia': peer('kornia'), 'fastai': peer('fastai')}

def above(form, n, px, *args):
    "Highest memory of a call above its images and views, in MiB, and MiB of the views"
    form(pictures(2, px), *args)() # what a first call loads
    f,views = form(pictures(n, px), *args),[]
    top = peak_memory(lambda: views.extend(f()))
    return (top-sum(o.nbytes for o in views))/2**20, sum(o.nbytes for o in views)/2**20

def growth():
    "What changes in a row of the second table, and its (images, pixels, sizes, counts)"
    return [*(('batch', (n,128,(96,48),(2,6)))              for n in (16,32,64,128,256)),
            *(('size',  (bs,px,(3*px//4,3*px//8),(2,6)))    for px in (64,128,256)),
            *(('views', (bs,128,(96,48),(n,3*n)))           for n in (1,2,4))]

def compare(px, sizes, memory):
    "The rows of one setting"
    x     = pictures(bs, px)
    calls = {nm: f(x, sizes) for nm,f in forms.items()}
    def _rows(names, rounds, n=1):
        torch.set_num_threads(n)
        s,r = paired({o: calls[o] for o in ('lightly',*names)}, rounds)
        return [{'form': nm if n==1 else f'{nm}, {n} threads', 'ms': 1e3*s[nm], 'images/s per core': bs/s[nm]/n, 'times lightly': 1/r[nm],
                 'MiB above': memory[nm] if n==1 else ''} for nm in s]
    return [*_rows(['ours'], 9), *(o for nm in list(calls)[2:] for o in _rows([nm], 3)[1:]), *_rows(['ours'], 9, cores)[1:]]

if __name__=='__main__':
    torch.set_num_threads(1)
    if sys.argv[1:]==['growth']:
        print(json.dumps([above(ours, n, px, sizes, counts) for _,(n,px,sizes,counts) in growth()])); sys.exit()
    if len(sys.argv)>1:
        print(json.dumps([above(forms[sys.argv[1]], bs, *o) for o in settings.values()])); sys.exit()
    memory = {nm: alone(__file__, nm) for nm in forms}
    tables = {nm: compare(*o, {k: v[i][0] for k,v in memory.items()}) for i,(nm,o) in enumerate(settings.items())}
    torch.set_num_threads(1)
    cases  = growth()
    s,_    = paired({i: ours(pictures(n, px), sizes, counts) for i,(_,(n,px,sizes,counts)) in enumerate(cases)}, 5)
    tables['Growth of ours, one thread'] = [
        {'what grows': what, 'images': n, 'px': px, 'views': ' + '.join(f'{c}×{z}' for c,z in zip(counts, sizes)), 'ms': 1e3*s[i],
         'ns a pixel of the views': 1e9*s[i]/(n*sum(c*z*z for c,z in zip(counts, sizes))), 'MiB of views': out, 'MiB above': up}
        for i,((what,(n,px,sizes,counts)),(up,out)) in enumerate(zip(cases, alone(__file__, 'growth')))]
    save('views', __doc__.partition('\n\n')[2].strip(), tables, ('lightly','kornia','pillow'))
