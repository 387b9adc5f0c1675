#!/usr/bin/env bash
# Installs what the adapters are tested against into a virtual environment: `frameworks.sh VENV`.
# fastai comes without its own list of dependencies, which bounds torch and brings spaCy, but with those that it needs
# here. The releases of fastai v1 lie beside it in VENV/fastai1, each for a process of its own.
set -euo pipefail
venv=$1
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)

processes=()
for release in 1.0.61 1.0.42; do  # meanwhile
    folder=$venv/fastai1/$release
    [ -d "$folder" ] || { "${pip[@]}" --no-deps --target "$folder" "fastai==$release" & processes+=($!); }
done
"${pip[@]}" 'transformers>=4.57,<6' 'accelerate<2'
"${pip[@]}" lightning torchvision scikit-learn pandas matplotlib requests pyyaml scipy packaging rich
# stable-baselines3 and what follows it are for docs/reinforcement-learning.md.
"${pip[@]}" --no-deps fastai==2.8.12 fastcore fasttransform fastdownload cloudpickle beartype 'plum-dispatch<2.10' \
    fastprogress==1.0.3 stable-baselines3 sb3-contrib gymnasium farama-notifications
for process in "${processes[@]}"; do wait "$process"; done
