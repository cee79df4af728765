"""How long does it take to find what is like an image, in a million? Twenty minutes, and 22 GB of memory.

Features are random directions around 1,000 centres. Cosines of all images, exact: `find_similar`, on features of 16 bits as `embed --half` writes them, in blocks of 4,096 rows.

- FAISS flat: `IndexFlatIP` of the same features in 32 bits and of unit length, which it keeps. FAISS flat, 16 bits: `IndexScalarQuantizer`, which keeps them as ours are kept.
  Their indices are ready; making them is timed for itself. Same images: the share of what ours finds that they find.
- s: median of three in turns with ours, after one that does not count, two threads; of ours the smaller of two medians. MiB: the highest memory above the features, each in a process of its own; of FAISS with its index, which
  grows by doubling.
- Copies: `find_duplicates` with all pairs, and by FAISS's cells (`exact=False`, training and filling them included), on 32 bits with a hundredth of the images there twice:
  found is the share of these pairs that is found.
"""
import json, sys, time

import faiss, torch
from fastcore.script import call_parse
from torch.nn import functional as F

from measure import alone, paired, peak_memory, save
from self_supervised.neighbors import find_duplicates, find_similar

def bunches(n, dim, dtype=torch.float16):
    g   = torch.Generator().manual_seed(0)
    mid = F.normalize(torch.randn(1000, dim, generator=g), dim=1)
    x   = torch.empty(n, dim, dtype=dtype)
    for o in x.split(65536): o.copy_(mid[torch.randint(1000, (len(o),), generator=g)]+torch.randn(len(o), dim, generator=g)*.5*dim**-.5)
    return x

def index(kind, x):
    "A flat index of the rows of `x`, filled"
    res = faiss.IndexFlatIP(x.shape[1]) if kind=='FAISS flat' else faiss.IndexScalarQuantizer(x.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for o in x.split(65536):
        rows = F.normalize(o.float(), dim=1).numpy()
        if not res.is_trained: res.train(rows)
        res.add(rows)
    return res

def searches(kind, x, q):
    "A search for what is like each of `q`, which are ready"
    if kind=='ours': return lambda: find_similar(x, q, 20)
    rows,of = F.normalize(q.float(), dim=1).numpy(),index(kind, x)
    return lambda: of.search(rows, 20)

kinds = 'ours','FAISS flat','FAISS flat, 16 bits'

def row(kind, n, dim, n_queries):
    "Ours and a peer in turns"
    x = bunches(n, dim)
    q = x[torch.arange(n_queries)*(n//n_queries)]
    t = time.perf_counter()
    peer  = searches(kind, x, q)
    made  = time.perf_counter()-t
    forms = {'ours':searches('ours', x, q), kind:peer}
    a,b   = (f()[1].tolist() for f in forms.values())
    secs,ratios = paired(forms, 3)
    return dict(secs=secs, ratio=ratios[kind], made=made, same=sum(len(set(u)&set(v)) for u,v in zip(a, b))/(20*n_queries))

def memory(kind, n, dim, n_queries):
    x = bunches(n, dim)
    q = x[torch.arange(n_queries)*(n//n_queries)]
    return peak_memory(lambda: searches(kind, x, q)())

def copies(n, dim):
    x = bunches(n, dim, torch.float32)
    m = n//100
    x[-m:] = x[:m]+torch.randn(m, dim, generator=torch.Generator().manual_seed(1))*.02*dim**-.5
    res = {}
    for exact in (True,False):
        t = time.perf_counter()
        groups = find_duplicates(x, .99, exact=exact)
        s = time.perf_counter()-t
        have = {frozenset(g) for g in groups}
        res['all pairs' if exact else 'cells'] = s,sum(frozenset((i,n-m+i)) in have for i in range(m))/m
    return res

@call_parse
def main(n:int=1_200_000, # images
         dim:int=2048, # features
         part:str=None): # one line, for a process of its own
    "Search, print the tables and write them to results/"
    torch.set_num_threads(2); faiss.omp_set_num_threads(2)
    if part:
        f,*args = json.loads(part)
        return print(json.dumps(globals()[f](*args)))
    lines = []
    for n_queries in (1, 100):
        m = {k:alone(__file__, '--part', json.dumps(['memory', k, n, dim, n_queries])) for k in kinds}
        r = {k:alone(__file__, '--part', json.dumps(['row', k, n, dim, n_queries])) for k in kinds[1:]}
        def line(k, s, ratio, made, same): return {'queries':n_queries, 'search':k, 's':f'{s:.2f}', '/ ours':f'{ratio:.2f}', 'MiB':f'{m[k]/2**20:,.0f}', 'making the index, s':made, 'same images':same}
        lines += [line('ours', min(o['secs']['ours'] for o in r.values()), 1, '', ''), *(line(k, o['secs'][k], o['ratio'], f'{o["made"]:.0f}', f'{100*o["same"]:.2f} %') for k,o in r.items())]
        print(*lines[-3:], sep='\n', file=sys.stderr, flush=True)
    pairs = []
    for size,d in ((20_000,512),(50_000,512),(100_000,512)):
        r = alone(__file__, '--part', json.dumps(['copies', size, d]))
        pairs += [{'images':f'{size:,}', 'features':d, 'pairs':k, 's':f'{s:.1f}', 'found':f'{100*found:.1f} %'} for k,(s,found) in r.items()]
        print(*pairs[-2:], sep='\n', file=sys.stderr, flush=True)
    save('search', __doc__.partition('\n\n')[2].strip(), {f'The 20 most similar of {n:,} images with {dim} features':lines, 'Copies':pairs}, ['faiss-cpu'])
