//! A client that goes on: it keeps a connection, has a limit for each request, and asks the next server when one fails.

use std::time::Duration;

use anyhow::{bail, ensure};
use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::Value;
use tokio::time::Instant;

use crate::connection::{Connection, Target};

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The request was never sent.
    #[error("not sent: {0}")]
    NotSent(String),
    /// It was sent, and nobody knows what became of it.
    #[error("no answer: {0}")]
    Unknown(String),
}

/// A client.
pub struct Client {
    targets: Vec<Target>,
    current: usize,
    connection: Option<Connection>,
    patience: Duration,
}

impl Client {
    /// A client of these servers, the first one first.
    pub fn new(targets: Vec<Target>, patience: Duration) -> Client {
        Client { targets, current: 0, connection: None, patience }
    }

    /// Closes the connection; the next request makes another.
    pub fn hang_up(&mut self) {
        self.connection = None;
    }

    /// Sends a request and reads the answer, within the client's patience altogether. A failure closes the connection,
    /// and the next request goes to the next server.
    pub async fn send(&mut self, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes), Failure> {
        let deadline = Instant::now() + self.patience;
        let patience = self.patience;
        let late = |what: &str| format!("{what} took longer than {} s", patience.as_secs_f64());
        let answer = match self.connected(deadline).await {
            Err(failure) => Err(failure),
            Ok(connection) => match tokio::time::timeout_at(deadline, connection.send(method, path, body)).await {
                Err(_) => Err(Failure::Unknown(late("the answer"))),
                Ok(Err(error)) => Err(Failure::Unknown(format!("{error:#}"))),
                Ok(Ok(answer)) => Ok(answer),
            },
        };
        if answer.is_err() {
            self.failed();
        }
        answer
    }

    /// Starts a request whose answer is a stream.
    pub async fn start(&mut self, path: &str) -> Result<http::Response<hyper::body::Incoming>, Failure> {
        let deadline = Instant::now() + self.patience;
        let connection = self.connected(deadline).await?;
        let answer = tokio::time::timeout_at(deadline, connection.start(Method::GET, path, Bytes::new())).await;
        let answer = match answer {
            Err(_) => Err(Failure::Unknown("no answer in time".into())),
            Ok(Err(error)) => Err(Failure::Unknown(format!("{error:#}"))),
            Ok(Ok(answer)) => Ok(answer),
        };
        if answer.is_err() {
            self.failed();
        }
        answer
    }

    /// Reads, again and again, until it is answered.
    pub async fn insist(&mut self, path: &str) -> anyhow::Result<Bytes> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let said = match self.send(Method::GET, path, Bytes::new()).await {
                Ok((status, body)) if status.is_success() => return Ok(body),
                Ok((status, body)) => format!("{status}: {}", message(&body)),
                Err(failure) => failure.to_string(),
            };
            if Instant::now() > deadline {
                bail!("GET {path}: {said}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Makes an object; anything but success is an error.
    pub async fn create(&mut self, path: &str, object: &Value) -> anyhow::Result<Value> {
        let (status, body) = self.send(Method::POST, path, Bytes::from(object.to_string())).await?;
        ensure!(status.is_success(), "POST {path}: {status}: {}", message(&body));
        Ok(serde_json::from_slice(&body)?)
    }

    async fn connected(&mut self, deadline: Instant) -> Result<&mut Connection, Failure> {
        let connection = match self.connection.take() {
            // A closed one is found out now rather than by losing a request.
            Some(connection) if !connection.is_closed() => connection,
            _ => {
                let target = &self.targets[self.current % self.targets.len()];
                match tokio::time::timeout_at(deadline, target.connect()).await {
                    Ok(Ok(connection)) => connection,
                    Ok(Err(error)) => {
                        self.failed();
                        return Err(Failure::NotSent(format!("{error:#}")));
                    }
                    Err(_) => {
                        self.failed();
                        return Err(Failure::NotSent("no connection in time".into()));
                    }
                }
            }
        };
        Ok(self.connection.insert(connection))
    }

    fn failed(&mut self) {
        self.connection = None;
        self.current += 1;
    }
}

/// What a server says in a `Status`.
pub fn message(body: &[u8]) -> String {
    let value: Option<Value> = serde_json::from_slice(body).ok();
    let said = value.as_ref().and_then(|v| v["message"].as_str());
    said.map_or_else(|| String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned(), str::to_owned)
}
