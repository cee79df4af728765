"""Time and memory of `nt_xent_loss`, forward and backward, against the plain matrix form and against the limit of 1 GiB.

Run with `python benchmarks/nt_xent.py`: under a minute on two cores. Times are medians of alternating runs and their ratio,
taken for one and for all threads; memory is the highest point above the inputs, each form in a process of its own.
"""
import math, sys, time
from statistics import median

import torch
from torch.nn import functional as F

from measure import alone, peak_memory

dim,limit = 128,2**30

def plain(z, temp=.07):
    "All similarities as one matrix"
    z,n = F.normalize(z, dim=1),len(z)
    s = (z@z.T/temp).masked_fill_(torch.eye(n, dtype=torch.bool), -math.inf)
    return F.cross_entropy(s, (torch.arange(n)+n//2)%n)

def ours(z):
    from self_supervised.vision.simclr import nt_xent_loss
    return nt_xent_loss(z)

def step(f, n):
    z = torch.randn(n, dim, requires_grad=True)
    t = time.perf_counter(); f(z).backward()
    return time.perf_counter()-t

def times(n, reps=11):
    "Median seconds of both, and of the ratio of neighbouring runs"
    for f in (plain, ours): step(f, n)
    pairs = [(step(plain, n), step(ours, n)) for _ in range(reps)]
    return *(median(o) for o in zip(*pairs)), median(b/a for a,b in pairs)

def peak(f, n):
    "Highest memory of one step, in bytes above the inputs"
    step(f, 64) # what a first call loads
    z = torch.randn(n, dim, requires_grad=True)
    return peak_memory(lambda: f(z).backward())

if __name__=='__main__':
    if len(sys.argv)>1: print(peak(dict(plain=plain, ours=ours)[sys.argv[1]], int(sys.argv[2]))); sys.exit()
    print('| embeddings | threads | plain, ms | ours, ms | ours / plain |\n|---|---|---|---|---|')
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for n in (512, 2048, 4096):
            a,b,r = times(n)
            print(f'| {n} | {threads} | {1e3*a:.1f} | {1e3*b:.1f} | {r:.2f} |', flush=True)
    print('\n| embeddings | plain, MiB above the inputs | ours | ours / limit of 1 GiB |\n|---|---|---|---|')
    for n in (2048, 8192, 16384):
        a,b = (alone(__file__, nm, n) for nm in ('plain','ours'))
        print(f'| {n} | {a/2**20:.0f} | {b/2**20:.0f} | {b/limit:.2f} |', flush=True)
