//! The socket with two guards: against a peer that does not read, and against losing an answer to a peer that still writes.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

use super::connections::Connection;

/// What must leave within one write timeout while the socket is full.
const MIN_PROGRESS_BYTES: usize = 16 << 10;
/// How long, and for how many bytes, a closed connection is read to its end.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 256 << 20;

/// A TCP stream whose writes time out.
pub(super) struct GuardedIo {
    stream: TcpStream,
    connection: Arc<Connection>,
    write_timeout: Duration,
    /// Set while the socket is full: when to give up, and what left since it filled up.
    stall: Option<Stall>,
    linger: Linger,
}

struct Stall {
    give_up: Pin<Box<Sleep>>,
    written_bytes: usize,
}

enum Linger {
    No,
    Reading { give_up: Pin<Box<Sleep>>, bytes: usize },
    Done,
}

impl GuardedIo {
    pub(super) fn new(stream: TcpStream, connection: Arc<Connection>, write_timeout: Duration) -> Self {
        Self { stream, connection, write_timeout, stall: None, linger: Linger::No }
    }

    /// Passes the result of a write on, or an error when the socket has been full for too long.
    fn guard(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match written {
            Poll::Pending => {
                let timeout = self.write_timeout;
                let stall = self
                    .stall
                    .get_or_insert_with(|| Stall { give_up: Box::pin(tokio::time::sleep(timeout)), written_bytes: 0 });
                ready!(stall.give_up.as_mut().poll(cx));
                Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not read")))
            }
            Poll::Ready(Ok(n)) => {
                if let Some(stall) = &mut self.stall {
                    stall.written_bytes += n;
                    if stall.written_bytes >= MIN_PROGRESS_BYTES {
                        self.stall = None;
                    }
                }
                Poll::Ready(Ok(n))
            }
            failed @ Poll::Ready(Err(_)) => failed,
        }
    }

    /// Reads and forgets what the peer still sends. Closing with unread bytes would reset the connection, and the reset can
    /// overtake the answer: a client that uploads too much would see a broken pipe in place of its 413.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Linger::Reading { give_up, bytes } = &mut self.linger else { return Poll::Ready(()) };
        let mut scratch = [0; 16 << 10];
        loop {
            let mut buffer = ReadBuf::new(&mut scratch);
            match Pin::new(&mut self.stream).poll_read(cx, &mut buffer) {
                Poll::Pending => return give_up.as_mut().poll(cx),
                Poll::Ready(result) => {
                    *bytes += buffer.filled().len();
                    if result.is_err() || buffer.filled().is_empty() || *bytes > LINGER_BYTES {
                        return Poll::Ready(());
                    }
                }
            }
        }
    }
}

impl AsyncRead for GuardedIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            self.connection.on_read();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for GuardedIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.guard(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.guard(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// hyper flushes when its own buffer is empty: the peer has taken all there is.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stall = None;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Linger::No = self.linger {
            ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
            self.linger = if self.connection.has_unread_body() {
                Linger::Reading { give_up: Box::pin(tokio::time::sleep(LINGER)), bytes: 0 }
            } else {
                Linger::Done
            };
        }
        ready!(self.poll_linger(cx));
        self.linger = Linger::Done;
        Poll::Ready(Ok(()))
    }
}
