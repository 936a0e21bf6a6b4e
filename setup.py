"""Installs `st_moe` and its command `st-moe`."""

import setuptools

setuptools.setup(
  name='st_moe',
  version='0.1.0',
  description='Stable, transferable sparse expert models (ST-MoE) in JAX.',
  license='Apache-2.0',
  python_requires='>=3.11',
  # Configs and experiments are read by the command: a wheel has them inside.
  packages=[
    *setuptools.find_packages(include=['st_moe', 'st_moe.*']),
    *('st_moe.configs', 'st_moe.configs.methods', 'st_moe.experiments'),
  ],
  package_dir={
    'st_moe.configs': 'configs',
    'st_moe.experiments': 'experiments',
  },
  package_data={
    'st_moe.configs': ['gin/*/*.gin'],
    'st_moe.experiments': ['*.md'],
  },
  install_requires=[
    'argcomplete>=3.5',
    'array-record>=0.8',
    'etils[epath]>=1.9',
    'flax>=0.12',
    'gin-config>=0.5',
    'grain>=0.2.15',
    'huggingface_hub>=0.30',
    'jax>=0.10',
    'matplotlib>=3.8',
    'ml_collections>=1.0',
    'numpy>=2.0',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11.20,<1',
    'rich>=13.0',
    'rouge-score>=0.1.2',
    'safetensors>=0.5',
    'scipy>=1.13',
    'sentencepiece>=0.2',
    'tensorboardX>=2.6',
  ],
  extras_require={
    'tpu': ['jax[tpu]'],
    'cuda': ['jax[cuda12]'],
    'gcp': ['gcsfs'],  # For gs:// where TensorFlow is not used for it.
    'datasets': ['datasets>=3.0'],
    'hf': ['transformers>=5.23', 'torch'],
    # Tasks of others, and TensorFlow with it, which is half of an install.
    'seqio': ['seqio>=0.0.20'],
    'kernels': [],  # Pallas, which comes with jax.
    'notebooks': ['jupyterlab', 'jupytext'],
    'docs': ['myst-nb>=1.4', 'sphinx>=8.2', 'sphinx-book-theme>=1.1'],
    'wandb': ['wandb'],
    'dev': [
      'jupytext>=1.16',
      'nbclient>=0.10',
      'pytest>=8.0',
      'pytest-xdist>=3.5',
      'ruff>=0.9',
      'seqio>=0.0.20',
    ],
  },
  entry_points={'console_scripts': ['st-moe = st_moe.cli:main']},
)
