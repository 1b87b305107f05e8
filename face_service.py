"""The client of a face server: copy this one file; it needs Python 3 and nothing else.

    from face_service import FaceService
    fc = FaceService()
    fc.connect("127.0.0.1:8010")
    with open("face.jpg", "rb") as f:
        result = fc.encode([f.read()])     # one list of floats for each image
    fc.close()

With several servers requests go round; one that fails is left out and its request goes to the next. A server that came
back is found again when all others are gone.
"""

import base64
import http.client
import json

ADDRESS = "/FaceClassifyService/inference"


class FaceServiceError(RuntimeError):
    """No server gave embeddings; the message is the last one's reason."""


class FaceService:
    """timeout: seconds for a connection and for an answer. token: the server's, where it wants one."""

    def __init__(self, timeout=60.0, token=""):
        self.timeout, self.token = timeout, token
        self.server_list, self.con_list, self.con_index = [], [], 0
        self._reason = ""

    def connect(self, server="127.0.0.1:8010"):
        """Adds a server, "host:port". May be called again for others."""
        host, _, port = server.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"server {server!r}: give host:port, for example 127.0.0.1:8010")
        if server not in self.server_list:
            self.server_list.append(server)
        self.con_list.append(self._open(server))

    def connect_all_server(self, server_list):
        """Adds each of a list of "host:port"."""
        for server in server_list:
            self.connect(server)

    def encode(self, images):
        """Embeddings, a list of floats for each of `images` (bytes of encoded images), in their order.

        A server that fails is left out and the next one asked. Raises FaceServiceError where none is left, or where a
        server says that an image cannot be used.
        """
        if isinstance(images, (bytes, bytearray)):
            raise TypeError("encode takes a list of images")
        texts = [base64.b64encode(image).decode("ascii") for image in images]
        answer, again = "retry", True
        while answer == "retry":
            answer = self.infer(json.dumps({"base64_string": texts}))
            if answer == "fail" and again:  # servers that were left out long ago may be back
                answer, again = "retry", False
        if answer == "fail":
            raise FaceServiceError(f"All server failed: {self._reason}")
        if "instance" not in answer:
            raise FaceServiceError(str(answer.get("error", "the server's answer has no embeddings")))
        return [one["embedding"] for one in answer["instance"]]

    def infer(self, request_msg):
        """One request (JSON text) to the next server: its answer as a dict; "retry" where it failed and others are
        left, "fail" where none is."""
        if not self.con_list:
            self.con_list = [self._open(server) for server in self.server_list]
        if not self.con_list:
            raise FaceServiceError("no server: call connect first")
        self.con_index %= len(self.con_list)
        connection = self.con_list[self.con_index]
        try:
            answer = self._post(connection, request_msg)
            self.con_index = (self.con_index + 1) % len(self.con_list)
            return answer
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._reason = f"{connection.host}:{connection.port}: {error or type(error).__name__}"
            print(self._reason)
            connection.close()
            self.con_list.remove(connection)
            self.con_index = 0
        if self.con_list:
            return "retry"
        print("All server failed")
        return "fail"

    def close(self):
        """Closes every connection and forgets the servers."""
        for connection in self.con_list:
            connection.close()
        self.server_list, self.con_list, self.con_index = [], [], 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def _open(self, server):
        host, _, port = server.rpartition(":")
        return http.client.HTTPConnection(host.strip("[]"), int(port), timeout=self.timeout)

    def _post(self, connection, request_msg):
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = "Bearer " + self.token
        was_open = connection.sock is not None
        try:
            connection.request("POST", ADDRESS, request_msg, headers)
            response = connection.getresponse()
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
            connection.close()
            if not was_open:
                raise
            # the server closed a connection that had been idle for long: that is no failure
            connection.request("POST", ADDRESS, request_msg, headers)
            response = connection.getresponse()
        body = response.read()
        if response.status >= 500:
            raise http.client.HTTPException(f"status {response.status}")
        answer = json.loads(body.decode("utf-8"))
        if not isinstance(answer, dict):
            raise ValueError("the answer is no object")
        return answer
