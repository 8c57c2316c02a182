"""A connection of uvicorn with limits that uvicorn's own lacks."""

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 15  # for a request to arrive, and for a client to read on
MAX_CONNECTIONS = 500  # and BACKLOG at once for a moment: fewer than the 1024 files that a process may usually open
BACKLOG = 128


class Connection(H11Protocol):
    """Closes unless each request, headers and body, arrives within SECONDS, and its client reads what is sent."""

    timer = None

    def limit(self):
        """Start the time of the client if the connection waits for it; otherwise end it."""
        is_waiting = self.flow.write_paused or self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if is_waiting and self.timer is None:
            self.timer = self.loop.call_later(SECONDS, self.transport.abort)
        elif not is_waiting and self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self.limit()

    def handle_events(self):  # what has arrived, also while the last request was answered
        super().handle_events()
        self.limit()

    def pause_writing(self):
        super().pause_writing()
        self.limit()

    def resume_writing(self):
        super().resume_writing()
        self.limit()
