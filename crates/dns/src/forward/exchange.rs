//! A question to other servers: one after the other, and by TCP what is too large for a datagram.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    serialize::binary::DecodeError,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::{Instant, sleep_until, timeout},
};

use super::Health;
use crate::{
    cache::{self, Key},
    message::{MOST_UDP, Response},
};

/// How long one server has before the next is asked as well.
const PATIENCE: Duration = Duration::from_millis(400);
/// How long a server has at all.
const ATTEMPT: Duration = Duration::from_secs(2);
/// How long all of them have: less than clients wait.
const BUDGET: Duration = Duration::from_millis(4500);
/// How often each is asked.
const ROUNDS: usize = 2;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("there is no server to ask")]
    NoServer,
    #[error("{0}: no answer in time")]
    Late(SocketAddr),
    #[error("{server}: {source}")]
    Io { server: SocketAddr, source: io::Error },
    #[error("{server}: what it says is no answer: {source}")]
    Answer { server: SocketAddr, source: DecodeError },
    #[error("{server}: it answers another question")]
    Other { server: SocketAddr },
    #[error("{server}: {code}")]
    Code { server: SocketAddr, code: ResponseCode },
    #[error("the question cannot be written")]
    Question,
}

/// Asks. Gives the answer and how many bytes it had.
pub(super) async fn ask(key: &Key, servers: &[SocketAddr], health: &Health) -> Result<(Response, usize), Error> {
    let order = health.order(servers);
    let mut waiting = std::iter::repeat_n(&order, ROUNDS).flatten().copied();
    let mut running = FuturesUnordered::new();
    let mut last = Error::NoServer;
    let deadline = Instant::now() + BUDGET;
    let mut next = Instant::now();
    loop {
        let can_start = waiting.clone().next().is_some();
        // All have had their say.
        if running.is_empty() && !can_start {
            return Err(last);
        }
        tokio::select! {
            biased;
            Some((server, result)) = running.next(), if !running.is_empty() => match result {
                Ok(answer) => {
                    health.works(server);
                    return Ok(answer);
                }
                Err(error) => {
                    tracing::debug!(%server, "{error}");
                    health.failed(server);
                    last = error;
                    // Somebody else at once; the same one again only after a moment.
                    if waiting.clone().next().is_some_and(|other| other != server) {
                        next = Instant::now();
                    }
                }
            },
            () = sleep_until(next), if can_start => {
                next = Instant::now() + PATIENCE;
                if let Some(server) = waiting.next() {
                    running.push(async move { (server, attempt(key, server).await) });
                }
            }
            () = sleep_until(deadline) => return Err(last),
        }
    }
}

async fn attempt(key: &Key, server: SocketAddr) -> Result<(Response, usize), Error> {
    let deadline = Instant::now() + ATTEMPT;
    let question = question(key)?;
    let (message, bytes) = match tokio::time::timeout_at(deadline, datagram(&question, key, server)).await {
        Ok(answer) => answer?,
        Err(_) => return Err(Error::Late(server)),
    };
    let (message, bytes) = match message.metadata.truncation {
        false => (message, bytes),
        true => timeout(ATTEMPT, stream(&question, key, server)).await.map_err(|_| Error::Late(server))??,
    };
    match message.metadata.response_code {
        ResponseCode::NoError | ResponseCode::NXDomain => Ok((cache::response(message), bytes)),
        code => Err(Error::Code { server, code }),
    }
}

struct Question {
    id: u16,
    bytes: Vec<u8>,
}

fn question(key: &Key) -> Result<Question, Error> {
    let id = rand::random();
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.metadata.checking_disabled = key.unchecked;
    message.add_query(Query::query(key.name.clone(), key.asked));
    let mut edns = Edns::new();
    edns.set_max_payload(MOST_UDP);
    edns.set_dnssec_ok(key.dnssec);
    message.set_edns(edns);
    Ok(Question { id, bytes: message.to_vec().map_err(|_| Error::Question)? })
}

/// Whether bytes answer the question; `None` if they do not.
fn answers(bytes: &[u8], question: &Question, key: &Key) -> Result<Option<Message>, DecodeError> {
    if bytes.get(..2) != Some(&question.id.to_be_bytes()[..]) {
        return Ok(None);
    }
    let message = Message::from_vec(bytes)?;
    let same = match &message.queries[..] {
        [query] => query.name.to_lowercase() == key.name && query.query_type == key.asked,
        // Some servers do not repeat it when they refuse.
        [] => !matches!(message.metadata.response_code, ResponseCode::NoError | ResponseCode::NXDomain),
        _ => false,
    };
    Ok((same && message.metadata.message_type == MessageType::Response).then_some(message))
}

/// Every question has a socket of its own, and so a port that nobody guesses.
async fn datagram(question: &Question, key: &Key, server: SocketAddr) -> Result<(Message, usize), Error> {
    let io = |source| Error::Io { server, source };
    let own: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((own, 0)).await.map_err(io)?;
    socket.connect(server).await.map_err(io)?;
    socket.send(&question.bytes).await.map_err(io)?;
    let mut buffer = vec![0; 4096];
    loop {
        let len = socket.recv(&mut buffer).await.map_err(io)?;
        // Whoever forges an answer is not to end the wait for the right one.
        match answers(&buffer[..len], question, key) {
            Ok(Some(message)) => return Ok((message, len)),
            Ok(None) => {}
            Err(error) => tracing::debug!(%server, %error, "an answer is malformed"),
        }
    }
}

async fn stream(question: &Question, key: &Key, server: SocketAddr) -> Result<(Message, usize), Error> {
    let io = |source| Error::Io { server, source };
    let mut stream = TcpStream::connect(server).await.map_err(io)?;
    let len = u16::try_from(question.bytes.len()).map_err(|_| Error::Question)?;
    let mut out = len.to_be_bytes().to_vec();
    out.extend(&question.bytes);
    stream.write_all(&out).await.map_err(io)?;
    let len = usize::from(stream.read_u16().await.map_err(io)?);
    let mut buffer = vec![0; len];
    stream.read_exact(&mut buffer).await.map_err(io)?;
    match answers(&buffer, question, key) {
        Ok(Some(message)) => Ok((message, len)),
        Ok(None) => Err(Error::Other { server }),
        Err(source) => Err(Error::Answer { server, source }),
    }
}
