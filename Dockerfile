# The environment of the workflow: Python, and the packages of pyproject.toml in the versions of constraints.txt. The project is
# not in it but is mounted, so that an edit needs no new image. docs/platforms.md has the commands.
FROM python:3.11-slim-bookworm

# Empty: torch's CUDA build. With the address of PyTorch's index of CPU builds: the CPU build, which is much smaller.
ARG PIP_EXTRA_INDEX_URL=""

# With docker run --user, the user has no name and no home in the image, and needs both.
RUN useradd --create-home --uid 1000 longqlora && chmod 777 /home/longqlora
ENV HOME=/home/longqlora USER=longqlora

# torch has its own layer, because it is the largest and changes least.
WORKDIR /opt/longqlora
COPY constraints.txt .
RUN pip install --no-cache-dir --constraint constraints.txt torch
COPY pyproject.toml .
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    > requirements.txt \
    && pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt

USER 1000
WORKDIR /work
CMD ["bash"]
