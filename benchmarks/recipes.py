"""The small recipes as they are, on the embedded sample of Fashion-MNIST: encoder, views, optimiser, schedule, batch and epochs of the recipe, nothing changed.

5,000 images without labels (with all of them for SupCon), 28 pixels, grey; then the encoder is frozen and judged on 1,000 test images: k-NN with 20 neighbours among the training
images, and logistic regression on ten labels a class (the mean of five draws) and on all. Accuracy in %, mean ± standard deviation over seeds 0, 1, …;
s: seconds of training with one thread, the median. The figures stand in the recipes' `about`.
"""
import json, math, re, subprocess
from statistics import mean, median, stdev

import torch
from fastai.vision.all import set_seed
from fastcore.script import call_parse

from measure import here, save, seconds
from self_supervised.all import *

def run(recipe, seed, data):
    "Seconds of training, and what the encoder is worth before and after"
    set_seed(seed)
    learns = ssl_methods()[recipe.method].callback.needs_labels
    learn  = recipe.learner(tensor_dls(data[0] if learns else data[0][0], bs=recipe.bs))
    def judge(): return [100*float(o) for o in evaluate(learn.model.encoder, tensor_dls(*data, bs=500))]
    before = judge()
    with learn.no_bar(), learn.no_logging(): s = seconds(lambda: recipe.fit(learn))
    res = s,before,judge()
    print(f'{recipe.name}, seed {seed}: {s:.0f} s, {res[1:]}', flush=True)
    return res

def row(nm, epochs, secs, accs):
    cells = (f'{mean(o):.1f} ± {stdev(o) if len(o)>1 else math.nan:.1f}' for o in zip(*accs))
    return {'encoder':nm, 'epochs':epochs, 'seeds':len(accs), 's':median(secs), **dict(zip(('k-NN','linear, 10 labels a class','linear, all labels'), cells))}

@call_parse
def main(
    seeds:int=3, # runs of each
    only:str='', # recipes with this regular expression in their name; the results of the others stay, under their commit
):
    "Run the recipes and write the table to results/"
    torch.set_num_threads(1)
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
    names,rows = [o for o in recipes() if o.endswith('_small') and re.search(only, o)],{}
    for nm in names:
        r = get_recipe(nm)
        secs,before,after = zip(*(run(r, seed, fashion_mnist()) for seed in range(seeds)))
        rows |= {o['encoder']:o for o in (row(f'{r.arch}, untrained', 0, [0], before), row(nm, r.epochs, secs, after))}
    old = json.loads((here/'results'/'recipes.json').read_text())['tables'] if only else {}
    old = {h:left for h,rs in old.items() if (left := [o for o in rs if o['encoder'] not in rows])}
    save('recipes', __doc__.partition('\n\n')[2].strip(), old | {f'At commit {commit}':list(rows.values())})
