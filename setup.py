"Everything said here is read from settings.ini"
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
extras = {k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')}

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
      author=cfg['author'], license_expression=cfg['license'], license_files=['LICENSE', 'self_supervised/datasets/LICENSE*'],
      python_requires=f">={cfg['min_python']}",
      long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      classifiers=[f"Development Status :: {cfg['status']}", 'Intended Audience :: Developers', 'Intended Audience :: Science/Research',
                   'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
      packages=find_packages(include=['self_supervised', 'self_supervised.*']), include_package_data=True,
      install_requires=cfg['requirements'].split(), extras_require=extras,
      entry_points={'nbdev': ['self_supervised=self_supervised._modidx:d'],
                    'console_scripts': cfg['console_scripts'].split()})
