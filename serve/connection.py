"""A connection of uvicorn with time limits, which uvicorn's own lacks."""

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 15  # for a request to arrive, and for a client to read on


class Connection(H11Protocol):
    """Closes unless each request, headers and body, arrives within SECONDS, and its client reads what is sent."""

    timer = None

    def limit(self, is_waiting):
        """Start or end the time of the client."""
        if is_waiting and self.timer is None:
            self.timer = self.loop.call_later(SECONDS, self.transport.abort)
        elif not is_waiting and self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def connection_made(self, transport):
        super().connection_made(transport)
        self.limit(True)

    def data_received(self, data):
        super().data_received(data)
        self.limit(self.conn.their_state in (h11.IDLE, h11.SEND_BODY))

    def pause_writing(self):
        super().pause_writing()
        self.limit(True)

    def resume_writing(self):
        super().resume_writing()
        self.limit(False)
