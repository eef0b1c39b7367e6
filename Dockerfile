# Any Linux image with Python 3.11 or later, such as a mirror's copy of this one.
ARG BASE_IMAGE=python:3.13-slim
# For a base without pip: an image with pip, and with the same Python at the same path.
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS build
# Both environments have no pip. This stage's pip installs into them, and stays behind.
RUN python3 -m venv --without-pip /opt/venv && python3 -m venv --without-pip /opt/build
WORKDIR /src
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements requirements
RUN python3 -m pip --python /opt/venv/bin/python install \
      --require-hashes -r requirements/worker.lock \
 && python3 -m pip --python /opt/build/bin/python install \
      --require-hashes -r requirements/build.lock
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN python3 -m pip --python /opt/build/bin/python wheel --no-deps --no-build-isolation -w dist . \
 && python3 -m pip --python /opt/venv/bin/python install --no-deps dist/*.whl

FROM ${BASE_IMAGE}
# The user is a number, because Kubernetes' runAsNonRoot can't resolve a name.
RUN useradd --uid 10001 --no-create-home --home-dir /app --shell /usr/sbin/nologin worker
COPY --from=build /opt/venv /opt/venv
# PIP_PYTHON makes the base's pip install a derived image's libraries beside the worker.
ENV PATH=/opt/venv/bin:$PATH \
    PIP_PYTHON=/opt/venv/bin/python \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NODE_ENV=production
# The task list goes here: mount tasks_config.py, or copy it in an image FROM this one.
WORKDIR /app
USER 10001:10001
STOPSIGNAL SIGTERM
# Without a shell, the worker is process 1 and gets the signals itself.
CMD ["autoflow-worker", "start"]
