# The demo on a CPU: trains in about a minute and leaves its report in the folder that is mounted at /work.
#     docker build -t dpo-lightning . && docker run --rm --user "$(id -u)" -v "$PWD:/work" dpo-lightning
# Any other command goes at the end: docker run ... dpo-lightning fit --config gpt2
FROM python:3.13-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim
COPY --from=build /wheels /wheels
# torch first, without CUDA: its usual wheel brings gigabytes of libraries for GPUs.
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir /wheels/*.whl && rm -r /wheels
# Not root, and with a home that any user may write, for caches of data sets and models.
RUN useradd --create-home dpo && chmod 777 /home/dpo && mkdir -m 777 /work
ENV HOME=/home/dpo
USER dpo
WORKDIR /work
ENTRYPOINT ["dpo-lightning"]
CMD ["demo"]
