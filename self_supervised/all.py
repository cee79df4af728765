"""The whole public API: `from self_supervised.all import *`

Of rooms behind a face – `pixels` behind `augmentations`, `state` behind `checkpoint` – it brings what the face hands on; what they share among themselves stays there. The networks in `models` are imported from there, as some have the names of others in fastai."""
from importlib import import_module as _import
from pkgutil import iter_modules as _modules

from self_supervised import vision as _vision
# the ground
from self_supervised.dist import *
from self_supervised.methods import *
from self_supervised.basics import *
from self_supervised.packed import *
from self_supervised.ranges import *
from self_supervised.batches import *
from self_supervised.fit_checks import *
from self_supervised.pipelines import *
from self_supervised.core import *
from self_supervised.watcher import *
# images → views → scores → targets
from self_supervised.whole_images import *
from self_supervised.data import *
from self_supervised.loaders import *
from self_supervised.stream_order import *
from self_supervised.shards import *
from self_supervised.streams import *
from self_supervised.augmentations import *
from self_supervised.layers import *
from self_supervised.multicrop import *
from self_supervised.teacher import *
from self_supervised.sinkhorn import *
from self_supervised.queue import *
from self_supervised.memory import *
from self_supervised.kmeans import *
# judges, and runs
from self_supervised.neighbors import *
from self_supervised.evaluation import *
from self_supervised.selection import *
from self_supervised.label_curve import *
from self_supervised.optimizer import *
from self_supervised.diagnostics import *
from self_supervised.loggers import *
from self_supervised.checkpoint import *
from self_supervised.pretrained import *
from self_supervised.recipes import *
from self_supervised.suggest import *
from self_supervised.modules import *
from self_supervised.transfer import *
from self_supervised.feature_table import *
from self_supervised.embed import *
from self_supervised.gallery import *
from self_supervised.image_map import *

for _m in (_import(f'self_supervised.vision.{o.name}') for o in _modules(_vision.__path__)): # each method that there is
    globals().update({n:getattr(_m, n) for n in _m.__all__})
