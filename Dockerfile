# gpt_jax on NVIDIA GPUs: CUDA comes with JAX's wheels, so the image needs the host's driver alone.
#   docker build -t gpt_jax .
#   docker run --rm --gpus=all -v "$PWD:/work" gpt_jax train
FROM python:3.12-slim
COPY . /tmp/gpt_jax
RUN pip install --no-cache-dir "/tmp/gpt_jax[cuda,data,hub,tokenizers]" && rm -r /tmp/gpt_jax
WORKDIR /work
ENTRYPOINT ["gpt-jax"]
CMD ["--help"]
