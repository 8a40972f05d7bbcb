//! Bytes from a stream, never more than the file has left and never into more memory than they fill.

use std::fmt::Arguments;
use std::io::{self, Read};

use super::error::GgufError;
use super::limits::MAX_HEADER_BYTES;

/// Bytes that are read at once, and the most that memory is reserved for before they were read.
const CHUNK_BYTES: usize = 64 << 10;

/// A buffered reader that knows its position and how far it may go.
///
/// `field` arguments name what is being read; they are only made into text for an error.
pub(super) struct Source<R> {
    reader: R,
    /// Bytes that were read and not yet used: `buffer[start..end]`.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    position: u64,
    file_bytes: u64,
}

impl<R: Read> Source<R> {
    pub(super) fn new(reader: R, file_bytes: u64) -> Self {
        let buffer_bytes = file_bytes.min(CHUNK_BYTES as u64) as usize;
        Self { reader, buffer: vec![0; buffer_bytes].into(), start: 0, end: 0, position: 0, file_bytes }
    }

    /// Bytes read so far, which is the offset of the next field.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Bytes from here to the end of the file.
    pub(super) fn left(&self) -> u64 {
        self.file_bytes.saturating_sub(self.position)
    }

    /// Checks that the file has `needed` more bytes and that the header stays within its limit with them.
    pub(super) fn require(&self, needed: u64, field: Arguments<'_>) -> Result<(), GgufError> {
        if needed > self.left() {
            return Err(self.truncated(needed, self.left(), field));
        }
        if self.position + needed > MAX_HEADER_BYTES {
            return Err(GgufError::TooLarge {
                field: format!("the header's length with {field}"),
                offset: self.position,
                given: self.position + needed,
                limit: MAX_HEADER_BYTES,
            });
        }
        Ok(())
    }

    pub(super) fn u32(&mut self, field: Arguments<'_>) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    pub(super) fn u64(&mut self, field: Arguments<'_>) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    pub(super) fn array<const N: usize>(&mut self, field: Arguments<'_>) -> Result<[u8; N], GgufError> {
        self.require(N as u64, field)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes, field)?;
        Ok(bytes)
    }

    /// Appends `n` bytes to `bytes`.
    pub(super) fn append(&mut self, bytes: &mut Vec<u8>, n: u64, field: Arguments<'_>) -> Result<(), GgufError> {
        self.require(n, field)?;
        let mut left = n as usize; // at most MAX_HEADER_BYTES
        while left > 0 {
            let buffered = self.buffered(field)?;
            let taken = &buffered[..buffered.len().min(left)];
            bytes.extend_from_slice(taken);
            let taken = taken.len();
            left -= taken;
            self.consume(taken);
        }
        Ok(())
    }

    /// Bytes that were read ahead, possibly none: what a loop over many small fields can look at before it
    /// [`consume`](Self::consume)s them. They are in the file, so no [`require`](Self::require) is needed.
    pub(super) fn at_hand(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// A string: its length in 64 bits, then its bytes, at most `limit` of them. Returns the length.
    pub(super) fn append_string(
        &mut self,
        bytes: &mut Vec<u8>,
        limit: u64,
        field: Arguments<'_>,
    ) -> Result<u64, GgufError> {
        let offset = self.position;
        let length = self.u64(format_args!("the length of {field}"))?;
        if length > limit {
            return Err(GgufError::TooLarge { field: format!("the length of {field}"), offset, given: length, limit });
        }
        self.append(bytes, length, field)?;
        Ok(length)
    }

    fn fill(&mut self, mut bytes: &mut [u8], field: Arguments<'_>) -> Result<(), GgufError> {
        while !bytes.is_empty() {
            let buffered = self.buffered(field)?;
            let taken = buffered.len().min(bytes.len());
            bytes[..taken].copy_from_slice(&buffered[..taken]);
            bytes = &mut bytes[taken..];
            self.consume(taken);
        }
        Ok(())
    }

    /// The bytes at hand, at least one; the next read of the file where none are left.
    fn buffered(&mut self, field: Arguments<'_>) -> Result<&[u8], GgufError> {
        while self.start == self.end {
            let limit = self.left().min(self.buffer.len() as u64) as usize;
            match self.reader.read(&mut self.buffer[..limit]) {
                // The file is shorter than its size was, or the caller's size was wrong.
                Ok(0) => return Err(self.truncated(1, 0, field)),
                Ok(n) => (self.start, self.end) = (0, n),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(GgufError::Io { file: field.to_string(), source }),
            }
        }
        Ok(self.at_hand())
    }

    /// Marks the first `n` bytes at hand as used.
    pub(super) fn consume(&mut self, n: usize) {
        self.start += n;
        self.position += n as u64;
    }

    fn truncated(&self, needed: u64, left: u64, field: Arguments<'_>) -> GgufError {
        GgufError::Truncated { field: field.to_string(), offset: self.position, needed, left }
    }
}
