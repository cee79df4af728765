"""draft"""
import math
from statistics import mean, median, stdev

import torch
from fastcore.script import call_parse
from fastai.vision.all import ConvLayer, DataLoaders, Learner, ResBlock, set_seed
from torch import nn
from torch.nn import functional as F

from measure import save, seconds, table
from self_supervised.all import *

hidden,dim,protos,temp = 256,128,100,.2
large,small = (28,(.4,1.)),(14,(.1,.4)) # side in pixels and area of a crop
multi,two   = [large]*2+[small]*4,[large]*2
jitter,sigmas = .5,(.1,1.)

def small_encoder():
    "A small ResNet, 1×28×28 → 128 features"
    return nn.Sequential(ConvLayer(1,16), *(ResBlock(1,i,o,stride=2) for i,o in ((16,32),(32,64),(64,128))), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def augs(views, build=get_batch_augs):
    return [build(size, resize_scale=scale, jitter_s=jitter, bw=False, blur_s=sigmas, stats=None) for size,scale in views]

def swav(x, bs, encoder, views=multi, build=get_batch_augs, K=None):
    "Our SwAV"
    return Learner(tensor_dls(x, bs=bs), create_swav_model(encoder, hidden, dim, protos), cbs=SWAV(augs(views, build), [0,1], K=K))

def simclr(x, bs, encoder):
    "Our SimCLR"
    return Learner(tensor_dls(x, bs=bs), create_simclr_model(encoder, hidden, dim, bn=True), cbs=SimCLR(augs(two), temp))

def lightly_dls(x, bs, tfm, workers=2):
    "Its transform, image by image in worker processes"
    from PIL import Image
    from torch.utils.data import DataLoader, default_collate
    dl = DataLoader([Image.fromarray(o[0].numpy()) for o in x], bs, shuffle=True, drop_last=True, num_workers=workers,
                    persistent_workers=workers>0, collate_fn=lambda b: (default_collate([tfm(o) for o in b]), torch.zeros(len(b))))
    return DataLoaders(dl, [])

def lightly_swav(x, bs, encoder, workers=2):
    "SwAV of lightly's modules"
    from lightly.loss import SwaVLoss
    from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
    from lightly.transforms import SwaVTransform
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder,self.head,self.prototypes = encoder,SwaVProjectionHead(128, hidden, dim),SwaVPrototypes(dim, protos)
        def forward(self, views):
            self.prototypes.normalize()
            return [self.prototypes(F.normalize(self.head(self.encoder(o)), dim=1)) for o in views]
    (sizes,scales),loss = zip(large, small),SwaVLoss()
    tfm = SwaVTransform(sizes, (2,4), *zip(*scales), cj_strength=jitter, random_gray_scale=0, sigmas=sigmas, normalize=None)
    return Learner(lightly_dls(x, bs, tfm, workers), Model(), loss_func=lambda scores, _: loss(scores[:2], scores[2:]))

def lightly_simclr(x, bs, encoder, workers=2):
    "SimCLR of lightly's modules"
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder,self.head = encoder,SimCLRProjectionHead(128, hidden, dim)
        def forward(self, views): return [self.head(self.encoder(o)) for o in views]
    loss = NTXentLoss(temp)
    tfm = SimCLRTransform(large[0], cj_strength=jitter, min_scale=large[1][0], random_gray_scale=0, sigmas=sigmas, normalize=None)
    return Learner(lightly_dls(x, bs, tfm, workers), Model(), loss_func=lambda z, _: loss(*z))

def judge(encoder, train, test):
    "Accuracies in %: k-NN; linear on ten labels a class, the mean of five draws; linear on all labels"
    dls = tensor_dls(train, test, bs=500)
    tr,te = extract_features(encoder, dls.train),extract_features(encoder, dls.valid)
    few = [linear_probe(sample_per_class(tr, 10, seed=i), te) for i in range(5)]
    return [100*o for o in (knn(tr, te), mean(few), linear_probe(tr, te))]
