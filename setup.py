"Package metadata lives in settings.ini; this hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
readme = here/'README.md'

setup(
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    python_requires='>=' + cfg['min_python'],
    license_expression=cfg['license'],
    keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'],
    classifiers=['Programming Language :: Python :: 3', 'Topic :: Multimedia :: Sound/Audio :: Speech'],
    packages=find_packages(include=['tts_tuner', 'tts_tuner.*']),
    package_data={'tts_tuner': ['py.typed']},
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['tts_tuner=tts_tuner._modidx:d']},
)
