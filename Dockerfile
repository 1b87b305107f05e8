# A face server on the CPU.
#
#   docker build -t face-server .
#   docker run -p 8010:8010 -v /path/to/models:/models -v gallery:/data face-server \
#       --model /models/model.onnx --gallery /data/gallery.db --token SECRET
#
# A .pth checkpoint is served with PyTorch: docker build --build-arg REQUIREMENTS="torch" -t face-server .
FROM python:3.11-slim

ARG REQUIREMENTS=""
WORKDIR /app
# MTCNN runs in torch; the server of an ONNX model with an ONNX detector (--det_model) does without.
COPY requirements-serve.txt ./
RUN pip install --no-cache-dir -r requirements-serve.txt numpy Pillow simplejpeg easydict ${REQUIREMENTS}

COPY . .
RUN useradd --create-home --uid 1000 server && mkdir /data && chown server /data
USER 1000
VOLUME /data
EXPOSE 8010
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8010/readyz', timeout=5)"]
# Inside of a container every network is the container's own; -p says which of the machine's reach it.
ENTRYPOINT ["python", "-m", "deploy.server", "--host", "0.0.0.0", "--port", "8010"]
