//! SPDY/3.1, as far as Kubernetes' streaming uses it: streams with headers, data both ways, half-closing, pings. There
//! is no flow control but TCP's, as in the Go implementation at the other end.
//!
//! <https://www.chromium.org/spdy/spdy-protocol/spdy-protocol-draft3-1/>

use std::{
    collections::HashMap,
    io,
    sync::Arc,
    sync::atomic::{AtomicU32, Ordering},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
};

/// Headers of a stream; names are lower case.
pub type Headers = Vec<(String, String)>;

/// A frame. Settings, window updates and the like are skipped when read and never written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Opens a stream.
    SynStream {
        /// Odd from the client, even from the server.
        id: u32,
        /// The opener sends nothing more.
        fin: bool,
        /// What the stream is for.
        headers: Headers,
    },
    /// Accepts a stream.
    SynReply {
        /// The stream.
        id: u32,
    },
    /// Ends a stream at once.
    Reset {
        /// The stream.
        id: u32,
        /// 5 is CANCEL.
        status: u32,
    },
    /// Wants the same back.
    Ping(u32),
    /// No further streams.
    GoAway,
    /// Bytes of a stream.
    Data {
        /// The stream.
        id: u32,
        /// The last ones.
        fin: bool,
        /// The bytes.
        bytes: Bytes,
    },
}

const WORDS: [&str; 65] = [
    "options",
    "head",
    "post",
    "put",
    "delete",
    "trace",
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "connection",
    "content-base",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "location",
    "max-forwards",
    "pragma",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "retry-after",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "method",
    "get",
    "status",
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
    "origin",
];
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 \
Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found500 \
Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, \
Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,\
text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

/// The dictionary that headers are compressed with (section 2.6.10.1): words with their lengths, then one long text.
fn dictionary() -> Vec<u8> {
    let mut out = Vec::with_capacity(1423);
    for word in WORDS {
        out.put_u32(word.len() as u32);
        out.put_slice(word.as_bytes());
    }
    out.put_slice(TAIL.as_bytes());
    out
}

/// A peer's frames and headers are no longer than this.
const MAX_FRAME: usize = 4 << 20;
const MAX_HEADERS: usize = 64 << 10;

fn bad(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.to_owned())
}

/// Writes frames. Header compression spans the connection, so there is one per connection and direction.
pub struct Encoder {
    zlib: Compress,
}

impl Encoder {
    /// For a new connection.
    pub fn new() -> io::Result<Self> {
        let mut zlib = Compress::new(Compression::fast(), true);
        zlib.set_dictionary(&dictionary()).map_err(io::Error::other)?;
        Ok(Self { zlib })
    }

    fn block(&mut self, headers: &Headers) -> io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        plain.put_u32(headers.len() as u32);
        for (name, value) in headers {
            for text in [name, value] {
                plain.put_u32(text.len() as u32);
                plain.put_slice(text.as_bytes());
            }
        }
        let mut out = Vec::with_capacity(plain.len() + 256);
        let before = self.zlib.total_in();
        loop {
            let done = (self.zlib.total_in() - before) as usize;
            self.zlib.compress_vec(&plain[done..], &mut out, FlushCompress::Sync).map_err(io::Error::other)?;
            if (self.zlib.total_in() - before) as usize == plain.len() && out.len() < out.capacity() {
                return Ok(out);
            }
            out.reserve(1024);
        }
    }

    /// Appends a frame.
    pub fn encode(&mut self, frame: &Frame, out: &mut BytesMut) -> io::Result<()> {
        let control = |out: &mut BytesMut, kind: u16, flags: u8, length: usize| {
            out.put_u16(0x8003);
            out.put_u16(kind);
            out.put_u32(u32::from(flags) << 24 | length as u32);
        };
        match frame {
            Frame::SynStream { id, fin, headers } => {
                let block = self.block(headers)?;
                control(out, 1, u8::from(*fin), 10 + block.len());
                out.put_u32(*id);
                out.put_u32(0);
                out.put_u16(0);
                out.put_slice(&block);
            }
            Frame::SynReply { id } => {
                let block = self.block(&Vec::new())?;
                control(out, 2, 0, 4 + block.len());
                out.put_u32(*id);
                out.put_slice(&block);
            }
            Frame::Reset { id, status } => {
                control(out, 3, 0, 8);
                out.put_u32(*id);
                out.put_u32(*status);
            }
            Frame::Ping(id) => {
                control(out, 6, 0, 4);
                out.put_u32(*id);
            }
            Frame::GoAway => {
                control(out, 7, 0, 8);
                out.put_u32(0);
                out.put_u32(0);
            }
            Frame::Data { id, fin, bytes } => {
                out.put_u32(*id & 0x7fff_ffff);
                out.put_u32(u32::from(*fin) << 24 | bytes.len() as u32);
                out.put_slice(bytes);
            }
        }
        Ok(())
    }
}

/// Reads frames.
pub struct Decoder {
    zlib: Decompress,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { zlib: Decompress::new(true) }
    }
}

impl Decoder {
    fn headers(&mut self, block: &[u8]) -> io::Result<Headers> {
        let mut plain = Vec::with_capacity(1024);
        let before = self.zlib.total_in();
        loop {
            let done = (self.zlib.total_in() - before) as usize;
            match self.zlib.decompress_vec(&block[done..], &mut plain, FlushDecompress::Sync) {
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.zlib.set_dictionary(&dictionary()).map_err(io::Error::other)?;
                    continue;
                }
                Err(error) => return Err(io::Error::other(error)),
            }
            let done = (self.zlib.total_in() - before) as usize;
            if done == block.len() && plain.len() < plain.capacity() {
                break;
            }
            if plain.len() > MAX_HEADERS {
                return Err(bad("the headers are too long"));
            }
            plain.reserve(1024);
        }
        let mut rest = &plain[..];
        let number = |rest: &mut &[u8]| rest.try_get_u32().map_err(|_| bad("truncated headers"));
        let text = |rest: &mut &[u8]| {
            let length = number(rest)? as usize;
            let value = rest.get(..length).ok_or_else(|| bad("truncated headers"))?;
            let value = String::from_utf8_lossy(value).into_owned();
            rest.advance(length);
            Ok::<_, io::Error>(value)
        };
        let count = number(&mut rest)?;
        (0..count.min(1000)).map(|_| Ok((text(&mut rest)?.to_ascii_lowercase(), text(&mut rest)?))).collect()
    }

    /// Takes a frame out of the buffer; `None` if it is not there in full yet, or is one that means nothing to us.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> io::Result<Option<Frame>> {
        loop {
            if buffer.len() < 8 {
                return Ok(None);
            }
            let length = (u32::from_be_bytes([0, buffer[5], buffer[6], buffer[7]])) as usize;
            if length > MAX_FRAME {
                return Err(bad("a frame is too long"));
            }
            if buffer.len() < 8 + length {
                buffer.reserve(8 + length - buffer.len());
                return Ok(None);
            }
            let head = buffer.split_to(8);
            let mut body = buffer.split_to(length).freeze();
            let fin = head[4] & 1 != 0;
            if head[0] & 0x80 == 0 {
                let id = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
                return Ok(Some(Frame::Data { id, fin, bytes: body }));
            }
            let kind = u16::from_be_bytes([head[2], head[3]]);
            let short = |_| bad("truncated frame");
            let frame = match kind {
                1 => {
                    let id = body.try_get_u32().map_err(short)? & 0x7fff_ffff;
                    if body.len() < 6 {
                        return Err(bad("truncated frame"));
                    }
                    body.advance(6);
                    Frame::SynStream { id, fin, headers: self.headers(&body)? }
                }
                2 => {
                    let id = body.try_get_u32().map_err(short)? & 0x7fff_ffff;
                    self.headers(&body)?;
                    Frame::SynReply { id }
                }
                3 => {
                    Frame::Reset { id: body.try_get_u32().map_err(short)?, status: body.try_get_u32().map_err(short)? }
                }
                6 => Frame::Ping(body.try_get_u32().map_err(short)?),
                7 => Frame::GoAway,
                8 => {
                    // Trailing headers of a stream: nobody here sends any, but they must pass the decompressor.
                    body.try_get_u32().map_err(short)?;
                    self.headers(&body)?;
                    continue;
                }
                _ => continue,
            };
            return Ok(Some(frame));
        }
    }
}

/// Which end of the connection we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Opens odd streams.
    Client,
    /// Opens even streams.
    Server,
}

/// How many pieces of data wait for a stream's reader.
const QUEUE: usize = 64;

type Sinks = Arc<Mutex<HashMap<u32, mpsc::Sender<Bytes>>>>;

/// A stream. Dropping it resets it unless both sides are through.
pub struct Stream {
    /// Its headers.
    pub headers: Headers,
    /// Its sending half.
    pub writer: StreamWriter,
    /// Its receiving half; ends when the peer is through.
    pub reader: mpsc::Receiver<Bytes>,
}

impl Stream {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// The sending half of a stream.
#[derive(Clone)]
pub struct StreamWriter {
    id: u32,
    frames: mpsc::Sender<Frame>,
}

impl StreamWriter {
    /// Sends bytes, in frames of a bearable size.
    pub async fn send(&self, mut bytes: Bytes) -> io::Result<()> {
        loop {
            let piece = bytes.split_to(bytes.len().min(32 << 10));
            self.frame(Frame::Data { id: self.id, fin: false, bytes: piece }).await?;
            if bytes.is_empty() {
                return Ok(());
            }
        }
    }

    /// Sends nothing more.
    pub async fn finish(&self) -> io::Result<()> {
        self.frame(Frame::Data { id: self.id, fin: true, bytes: Bytes::new() }).await
    }

    /// Gives the stream up.
    pub async fn reset(&self) -> io::Result<()> {
        self.frame(Frame::Reset { id: self.id, status: 5 }).await
    }

    async fn frame(&self, frame: Frame) -> io::Result<()> {
        self.frames.send(frame).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// An open connection.
#[derive(Clone)]
pub struct Session {
    frames: mpsc::Sender<Frame>,
    sinks: Sinks,
    next: Arc<AtomicU32>,
}

impl Session {
    /// Takes over a connection. The future does the work and has to be polled; it ends with the connection. Streams
    /// that the peer opens come out of the receiver, already accepted.
    pub fn start<S>(
        io: S,
        role: Role,
    ) -> io::Result<(Self, mpsc::Receiver<Stream>, impl Future<Output = io::Result<()>> + Send)>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (mut reader, mut writer) = tokio::io::split(io);
        let (frames, mut outgoing) = mpsc::channel::<Frame>(QUEUE);
        let (opened, incoming) = mpsc::channel(QUEUE);
        let sinks = Sinks::default();
        let session = Self {
            frames: frames.clone(),
            sinks: Arc::clone(&sinks),
            next: Arc::new(AtomicU32::new(if role == Role::Client { 1 } else { 2 })),
        };
        let mut encoder = Encoder::new()?;
        let write = async move {
            let mut buffer = BytesMut::new();
            while let Some(frame) = outgoing.recv().await {
                encoder.encode(&frame, &mut buffer)?;
                while buffer.len() < 64 << 10 {
                    let Ok(frame) = outgoing.try_recv() else { break };
                    encoder.encode(&frame, &mut buffer)?;
                }
                writer.write_all_buf(&mut buffer).await?;
                writer.flush().await?;
            }
            writer.shutdown().await
        };
        let weak = frames.downgrade();
        drop(frames);
        let read = async move {
            let mut decoder = Decoder::default();
            let mut buffer = BytesMut::with_capacity(16 << 10);
            loop {
                while let Some(frame) = decoder.decode(&mut buffer)? {
                    take(frame, &sinks, &weak, &opened).await;
                }
                if reader.read_buf(&mut buffer).await? == 0 {
                    return Ok(());
                }
            }
        };
        let sinks = Arc::clone(&session.sinks);
        let work = async move {
            let result = tokio::select! {
                result = write => result,
                result = read => result,
            };
            // Readers of streams see the end.
            sinks.lock().clear();
            result
        };
        Ok((session, incoming, work))
    }

    /// Opens a stream.
    pub async fn open(&self, headers: Headers) -> io::Result<Stream> {
        let id = self.next.fetch_add(2, Ordering::Relaxed);
        let (sink, reader) = mpsc::channel(QUEUE);
        self.sinks.lock().insert(id, sink);
        let writer = StreamWriter { id, frames: self.frames.clone() };
        writer.frame(Frame::SynStream { id, fin: false, headers: headers.clone() }).await?;
        Ok(Stream { headers, writer, reader })
    }
}

async fn take(frame: Frame, sinks: &Sinks, frames: &mpsc::WeakSender<Frame>, opened: &mpsc::Sender<Stream>) {
    match frame {
        Frame::SynStream { id, fin, headers } => {
            let Some(frames) = frames.upgrade() else { return };
            let (sink, reader) = mpsc::channel(QUEUE);
            if !fin {
                sinks.lock().insert(id, sink);
            }
            let _ = frames.send(Frame::SynReply { id }).await;
            let _ = opened.send(Stream { headers, writer: StreamWriter { id, frames }, reader }).await;
        }
        Frame::Data { id, fin, bytes } => {
            let sink = sinks.lock().get(&id).cloned();
            if let Some(sink) = sink.filter(|_| !bytes.is_empty()) {
                // Waits when the reader is slow: that is the only flow control there is. A reader that has gone
                // refuses, and its bytes are dropped.
                let _ = sink.send(bytes).await;
            }
            if fin {
                sinks.lock().remove(&id);
            }
        }
        Frame::Reset { id, .. } => drop(sinks.lock().remove(&id)),
        Frame::Ping(id) => {
            if let Some(frames) = frames.upgrade() {
                let _ = frames.send(Frame::Ping(id)).await;
            }
        }
        Frame::SynReply { .. } | Frame::GoAway => {}
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_dictionary_is_the_standard_one() {
        let dictionary = dictionary();
        assert_eq!(dictionary.len(), 1423);
        let (mut a, mut b) = (1_u32, 0_u32);
        for byte in &dictionary {
            a = (a + u32::from(*byte)) % 65_521;
            b = (b + a) % 65_521;
        }
        // The identifier that every SPDY/3 peer announces.
        assert_eq!(b << 16 | a, 0xe3c6_a7c2);
    }

    fn frames() -> impl Strategy<Value = Vec<Frame>> {
        let id = 1..0x7fff_ffff_u32;
        let headers = proptest::collection::vec(("[a-z-]{1,20}", "[ -~]{0,200}"), 0..6);
        let frame = prop_oneof![
            (id.clone(), any::<bool>(), headers).prop_map(|(id, fin, headers)| Frame::SynStream { id, fin, headers }),
            id.clone().prop_map(|id| Frame::SynReply { id }),
            (id.clone(), any::<u32>()).prop_map(|(id, status)| Frame::Reset { id, status }),
            any::<u32>().prop_map(Frame::Ping),
            (id, any::<bool>(), proptest::collection::vec(any::<u8>(), 0..5000))
                .prop_map(|(id, fin, bytes)| Frame::Data { id, fin, bytes: bytes.into() }),
        ];
        proptest::collection::vec(frame, 1..20)
    }

    proptest! {
        #[test]
        fn round_trip_in_any_pieces(frames in frames(), piece in 1..4000_usize) {
            let mut encoder = Encoder::new().unwrap();
            let mut wire = BytesMut::new();
            for frame in &frames {
                encoder.encode(frame, &mut wire).unwrap();
            }
            let mut decoder = Decoder::default();
            let mut buffer = BytesMut::new();
            let mut got = Vec::new();
            for piece in wire.chunks(piece) {
                buffer.extend_from_slice(piece);
                while let Some(frame) = decoder.decode(&mut buffer).unwrap() {
                    got.push(frame);
                }
            }
            prop_assert_eq!(got, frames);
        }

        #[test]
        fn garbage_is_an_error_not_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            let mut decoder = Decoder::default();
            while let Ok(Some(_)) = decoder.decode(&mut buffer) {}
        }
    }

    #[tokio::test]
    async fn streams_between_two_sessions() {
        let (a, b) = tokio::io::duplex(1024);
        let (client, _, work_a) = Session::start(a, Role::Client).unwrap();
        let (_server, mut incoming, work_b) = Session::start(b, Role::Server).unwrap();
        tokio::spawn(work_a);
        tokio::spawn(work_b);
        let mut stream = client.open(vec![("streamtype".into(), "data".into())]).await.unwrap();
        let big = Bytes::from(vec![7_u8; 300_000]);
        let (writer, sent) = (stream.writer.clone(), big.clone());
        let sender = tokio::spawn(async move {
            writer.send(sent).await.unwrap();
            writer.finish().await.unwrap();
        });
        let mut other = incoming.recv().await.unwrap();
        assert_eq!(other.header("streamtype"), Some("data"));
        let mut got = Vec::new();
        while let Some(bytes) = other.reader.recv().await {
            got.extend_from_slice(&bytes);
        }
        assert_eq!(got.len(), big.len());
        sender.await.unwrap();
        // Half-closed: the answer still comes.
        other.writer.send(Bytes::from_static(b"bye")).await.unwrap();
        other.writer.finish().await.unwrap();
        assert_eq!(stream.reader.recv().await.unwrap(), "bye");
        assert!(stream.reader.recv().await.is_none());
    }
}
