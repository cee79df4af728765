"""Memory and time of a forward and backward pass of encoders, with `checkpoint_encoder` and without.

Run with `python benchmarks/checkpointing.py`: two to three minutes, on the CPU, under Linux. Memory is the highest point of one pass
above weights and gradients, which is what activations take; each number comes from a process of its own. Time is processor time on
one thread, both forms taking turns; numbers are medians, ratios those of neighbours.
"""
import sys, time
from copy import deepcopy
from statistics import median

import torch
from self_supervised.layers import checkpoint_encoder, create_fastai_encoder, create_timm_encoder

from measure import alone, peak_memory

cases = [('resnet50, timm',              create_timm_encoder,   'resnet50',              16, 128, 2),
         ('vit_small_patch16_224, timm', create_timm_encoder,   'vit_small_patch16_224',  8, 224, 2),
         ('resnet34, fastai, 2 chunks',  create_fastai_encoder, 'resnet34',              16, 128, 2),
         ('resnet34, fastai, 5 chunks',  create_fastai_encoder, 'resnet34',              16, 128, 5)]

def step(encoder, bs, size):
    "Seconds of one pass"
    x = torch.randn(bs, 3, size, size)
    t = time.process_time(); encoder(x).pow(2).mean().backward()
    return time.process_time()-t

def peak(i, ckpt):
    "Highest resident memory during one pass of case `i`, in bytes, above that before it"
    _,make,arch,bs,size,n = cases[i]
    encoder = make(arch, pretrained=False)
    if ckpt: encoder = checkpoint_encoder(encoder, n)
    step(encoder, 2, size) # what a first call loads, and the gradients
    return peak_memory(lambda: step(encoder, bs, size))

def times(i, reps=3):
    "Median seconds of a pass of case `i` without and with checkpointing, and of the ratio of neighbouring passes"
    _,make,arch,bs,size,n = cases[i]
    plain = make(arch, pretrained=False)
    ckpt  = checkpoint_encoder(deepcopy(plain), n)
    for m in (plain,ckpt): step(m, 2, size)
    pairs = [(step(plain, bs, size), step(ckpt, bs, size)) for _ in range(reps)]
    return *(median(o) for o in zip(*pairs)), median(b/a for a,b in pairs)

if __name__=='__main__':
    torch.set_num_threads(1)
    if len(sys.argv)>1: print(peak(*map(int, sys.argv[1:]))); sys.exit()
    print('| encoder | batch × pixels | MiB, plain | checkpointed | ratio | s, plain | checkpointed | ratio |\n|---|---|---|---|---|---|---|---|')
    for i,(name,_,_,bs,size,_) in enumerate(cases):
        a,b   = (alone(__file__, i, o) for o in (0,1))
        s,t,r = times(i)
        print(f'| {name} | {bs} × {size} | {a/2**20:.0f} | {b/2**20:.0f} | {b/a:.2f} | {s:.2f} | {t:.2f} | {r:.2f} |', flush=True)
