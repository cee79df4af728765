"""Pretrain an encoder on a folder of images, on one process or many; only the launch differs.
A run that was killed goes on where it was when the same command is given again:

    python examples/pretrain.py images --method swav --arch resnet50
    torchrun --nproc-per-node 8 examples/pretrain.py images --method swav --arch resnet50
    sbatch --nodes 4 examples/pretrain.sbatch images --method swav --arch resnet50
"""
import os, sys, warnings
from datetime import timedelta
warnings.filterwarnings('ignore', category=FutureWarning) # of libraries that import torch.jit

from accelerate import InitProcessGroupKwargs
from fastai.distributed import teardown_distrib
from fastai.vision.all import *
from fastcore.script import CliError, call_parse
from fastprogress import fastprogress

from self_supervised.all import *

@call_parse
def main(
    source:str, # folder of images, searched with all below it
    method:str='swav', # swav or simclr
    arch:str='resnet50', # encoder: any name that `create_encoder` knows
    size:int=224, # pixels of a view (the small views of SwAV: 3/7 of it); images are loaded a little larger
    bs:int=64, # images on each process
    epochs:int=100, # passes over the images
    lr:float=1e-3, # largest learning rate of the one-cycle schedule, for the joined batch of all processes
    temp:float=None, # temperature of the loss; default: 0.1 for SwAV, 0.07 for SimCLR
    hidden_size:int=2048, # width of the projector
    n_protos:int=3000, # prototypes of SwAV; for small data up to ten times the clusters you expect
    queue:int=3000, # projections in the queue of SwAV; 0 for none
    n_in:int=3, # channels: 3 for colour, 1 for grey
    low_resolution:bool=False, # keep the full resolution in the encoder's stem, for small images
    gentle:bool=False, # larger crops and no blur, for small images
    checkpointing:bool=False, # compute activations twice instead of keeping them: less memory, more time
    fp16:bool=False, # half precision, on a GPU
    bf16:bool=False, # the same with the range of single precision, on a newer GPU
    workers:int=None, # processes that decode images, beside each that trains; default: one a core, at most 8
    seed:int=42, # of weights, order and views
    out:Path='pretrained', # folder for checkpoints/ (the run so far) and encoder.safetensors (at the end)
    minutes:float=10, # save the run so many minutes after the last time
    timeout:int=600, # seconds after which processes that wait for a dead one give up
):
    "Pretrain an encoder with SwAV or SimCLR on a folder of images."
    fastprogress.NO_BAR = not sys.stdout.isatty() # in a file the table is enough
    if torch.cuda.is_available(): torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
    set_seed(seed)

    dls     = image_dls(source, size=size*8//7, bs=bs, n_in=n_in, num_workers=workers, seed=seed)
    encoder = create_encoder(arch, pretrained=False, n_in=n_in, low_resolution=low_resolution)
    if checkpointing: encoder = checkpoint_encoder(encoder)
    views,loss = dict(stats=imagenet_stats if n_in==3 else None, blur=not gentle), {} if temp is None else {'temp':temp}
    if method=='swav':
        if gentle: views.update(min_scales=(.4,.1), max_scales=(1.,.4))
        model = create_swav_model(encoder, hidden_size, n_protos=n_protos)
        ssl   = SWAV(get_swav_aug_pipelines(crop_sizes=(size, size*3//7), **views), crop_assgn_ids=[0,1], K=queue or None, **loss)
    elif method=='simclr':
        if gentle: views.update(resize_scale=(.3,1.))
        model = create_simclr_model(encoder, hidden_size)
        ssl   = SimCLR(get_simclr_aug_pipelines(size, **views), **loss)
    else: raise CliError(f'--method {method} is unknown: give one of {", ".join(ssl_methods())}')

    out.mkdir(parents=True, exist_ok=True)
    learn = Learner(dls, model, cbs=[ssl, CollapseMonitor(), Checkpoint(out/'checkpoints', minutes=minutes)], path=out)
    if fp16: learn.to_fp16()
    if bf16: learn.to_bf16()
    learn.resume(missing_ok=True)
    with learn.distrib_ctx(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))]):
        learn.fit_one_cycle(epochs, lr)

    if not rank() and not learn.checkpoint.stopped: print(f'The encoder is in {learn.export_encoder(out/"encoder.safetensors")}, for load_encoder')
    teardown_distrib()
