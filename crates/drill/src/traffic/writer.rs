//! A writer: the only one of its key. It numbers its values, writes each on the condition that nobody wrote since, and
//! looks where it is whenever it does not know.

use std::sync::Arc;

use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    NAMESPACE, PACE, Recorder, Way,
    client::{Client, Failure, message},
    maps, revision, seen,
};
use crate::history::{Class, Fate, Read, Revision, Write};

fn object(key: &str, value: u64, revision: Option<Revision>) -> Bytes {
    let mut object = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": key, "namespace": NAMESPACE, "labels": {"drill": "written"}},
        "data": {"value": value.to_string(), "weight": "x".repeat(512)},
    });
    if let Some(revision) = revision {
        object["metadata"]["resourceVersion"] = revision.to_string().into();
    }
    object.to_string().into()
}

/// Makes the key, with the value 1.
pub async fn create(way: &Way, recorder: &Recorder, key: &Arc<str>) -> anyhow::Result<()> {
    let (way, recorder, key) = (way.clone(), recorder.clone(), key.clone());
    let site = way.site.clone();
    let task = site.spawn(async move {
        let start = recorder.now();
        let (status, answer) = way.client().send(Method::POST, &maps(), object(&key, 1, None)).await?;
        anyhow::ensure!(status.is_success(), "{status}: {}", message(&answer));
        let fate = fate(Ok((status, answer)));
        let end = recorder.now();
        recorder.history().writes.push(Write { key, value: 1, start, end, fate });
        Ok(())
    });
    task.await?
}

/// Writes until `stop`.
pub async fn run(way: Way, recorder: Recorder, key: Arc<str>, stop: CancellationToken) {
    let mut client = way.client();
    let path = format!("{}/{key}", maps());
    // Whether we know what the key's last revision is.
    let (mut value, mut at) = (1, None);
    while !stop.is_cancelled() {
        match at {
            None => at = look(&way, &recorder, &mut client, &key).await,
            Some(revision) => {
                value += 1;
                let start = recorder.now();
                let answer = client.send(Method::PUT, &path, object(&key, value, Some(revision))).await;
                let fate = fate(answer);
                let error = why(&fate);
                at = if let Fate::Acknowledged(revision) = fate { Some(revision) } else { None };
                recorder.request(&way.name, Class::Write, start, error);
                let end = recorder.now();
                recorder.history().writes.push(Write { key: key.clone(), value, start, end, fate });
            }
        }
        tokio::time::sleep(PACE).await;
    }
}

/// Creates keys, each once and blindly, until `stop`: what a client does that need not know what is there.
pub async fn creator(way: Way, recorder: Recorder, prefix: Arc<str>, stop: CancellationToken) {
    let mut client = way.client();
    let name: Arc<str> = format!("{}, creating", way.name).into();
    for number in 0_u64.. {
        if stop.is_cancelled() {
            return;
        }
        let key: Arc<str> = format!("{prefix}-{number}").into();
        let start = recorder.now();
        let fate = fate(client.send(Method::POST, &maps(), object(&key, 1, None)).await);
        recorder.request(&name, Class::Write, start, why(&fate));
        let end = recorder.now();
        recorder.history().writes.push(Write { key, value: 1, start, end, fate });
        tokio::time::sleep(PACE * 5).await;
    }
}

/// Why a write failed, if it did.
fn why(fate: &Fate) -> Option<String> {
    match fate {
        Fate::Acknowledged(_) => None,
        Fate::Refused(why) | Fate::Unknown(why) => Some(why.clone()),
    }
}

/// Reads the key; what is read counts as a read like any other.
async fn look(way: &Way, recorder: &Recorder, client: &mut Client, key: &Arc<str>) -> Option<Revision> {
    let start = recorder.now();
    let answer = client.send(Method::GET, &format!("{}/{key}", maps()), Bytes::new()).await;
    let found = read(&way.name, key, start, recorder, answer, true);
    recorder.request(&way.name, Class::Read, start, found.as_ref().err().cloned());
    found.ok()?
}

/// Writes a read down, if it was answered; gives the key's revision, or why there is none.
pub fn read(
    client: &Arc<str>,
    key: &Arc<str>,
    start: crate::history::At,
    recorder: &Recorder,
    answer: Result<(StatusCode, Bytes), Failure>,
    consistent: bool,
) -> Result<Option<Revision>, String> {
    let (status, body) = answer.map_err(|f| f.to_string())?;
    let seen = match status {
        StatusCode::NOT_FOUND => None,
        status if status.is_success() => {
            let object: Value = serde_json::from_slice(&body).map_err(|e| format!("no JSON: {e}"))?;
            Some(seen(&object).ok_or("an object without its value")?)
        }
        status => return Err(format!("{status}: {}", message(&body))),
    };
    let end = recorder.now();
    let read = Read { client: client.clone(), key: key.clone(), start, end, seen, consistent };
    recorder.history().reads.push(read);
    Ok(seen.map(|s| s.revision))
}

/// What became of a write. A server that could not reach the store does not know itself, whatever it says.
fn fate(answer: Result<(StatusCode, Bytes), Failure>) -> Fate {
    match answer {
        Err(Failure::NotSent(why)) => Fate::Refused(format!("not sent: {why}")),
        Err(Failure::Unknown(why)) => Fate::Unknown(why),
        Ok((status, body)) if status.is_success() => {
            let object: Option<Value> = serde_json::from_slice(&body).ok();
            match object.as_ref().and_then(revision) {
                Some(revision) => Fate::Acknowledged(revision),
                None => Fate::Unknown("acknowledged without a resourceVersion".into()),
            }
        }
        Ok((status, body)) if status.is_client_error() => Fate::Refused(format!("{status}: {}", message(&body))),
        Ok((status, body)) => Fate::Unknown(format!("{status}: {}", message(&body))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fates() {
        let check = |status: u16, body: &str, expect: Fate| {
            let answer = Ok((StatusCode::from_u16(status).unwrap(), Bytes::from(body.to_owned())));
            assert_eq!(fate(answer), expect);
        };
        check(200, r#"{"metadata":{"resourceVersion":"7"}}"#, Fate::Acknowledged(7));
        check(200, "{}", Fate::Unknown("acknowledged without a resourceVersion".into()));
        check(409, r#"{"message":"no"}"#, Fate::Refused("409 Conflict: no".into()));
        check(503, r#"{"message":"later"}"#, Fate::Unknown("503 Service Unavailable: later".into()));
        assert_eq!(fate(Err(Failure::NotSent("x".into()))), Fate::Refused("not sent: x".into()));
        assert_eq!(fate(Err(Failure::Unknown("x".into()))), Fate::Unknown("x".into()));
    }
}
