//! Watchers: they go on from where they were cut off, and list again only when the server makes them.

use std::time::Duration;

use http_body_util::BodyExt as _;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::{
    Recorder, WRITTEN, Way,
    client::{Client, message},
    maps, revision, seen,
};
use crate::history::{Revision, Watch, WatchEvent};

/// How a stretch of watching ended.
pub enum End {
    /// The connection did, for whatever reason: it goes on from the same place.
    Broken,
    /// The server no longer knows what came after that place.
    Gone(String),
}

/// An event as the server sends it, or nothing but progress.
pub enum Told<'a> {
    /// `ADDED`, `MODIFIED`, `DELETED`.
    Change(&'a str, &'a Value),
    /// `BOOKMARK`.
    Progress,
}

/// Watches `path` after `from`, until the connection ends; `tell` gets each event with its revision.
pub async fn follow(
    client: &mut Client,
    path: &str,
    from: Revision,
    silence: Duration,
    mut tell: impl FnMut(Told<'_>, Revision),
) -> End {
    let join = if path.contains('?') { '&' } else { '?' };
    let path = format!("{path}{join}watch=true&resourceVersion={from}&allowWatchBookmarks=true&timeoutSeconds=600");
    let Ok(response) = client.start(&path).await else { return End::Broken };
    let status = response.status();
    let mut body = response.into_body();
    if !status.is_success() {
        let answer = body.collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        client.hang_up();
        return match status.as_u16() {
            410 => End::Gone(message(&answer)),
            _ => End::Broken,
        };
    }
    let mut rest: Vec<u8> = Vec::new();
    let end = loop {
        let frame = match tokio::time::timeout(silence, body.frame()).await {
            Ok(Some(Ok(frame))) => frame,
            _ => break End::Broken,
        };
        let Ok(data) = frame.into_data() else { continue };
        rest.extend_from_slice(&data);
        let mut gone = None;
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            let Ok(event) = serde_json::from_slice::<Value>(&line) else { continue };
            let object = &event["object"];
            match event["type"].as_str().unwrap_or_default() {
                "ERROR" if object["code"] == 410 => gone = object["message"].as_str().map(str::to_owned),
                "ERROR" => break,
                kind => {
                    let Some(revision) = revision(object) else { continue };
                    tell(if kind == "BOOKMARK" { Told::Progress } else { Told::Change(kind, object) }, revision);
                }
            }
        }
        if let Some(why) = gone {
            break End::Gone(why);
        }
    };
    // What is left of the answer would be in the way of the next request.
    client.hang_up();
    end
}

/// Lists, and registers a watch from there. Gives its number.
pub async fn begin(way: &Way, recorder: &Recorder) -> anyhow::Result<usize> {
    let (way, recorder) = (way.clone(), recorder.clone());
    let site = way.site.clone();
    site.spawn(async move {
        let from = list(&mut way.client()).await?;
        let watches = &mut recorder.history().watches;
        watches.push(Watch { client: way.name.clone(), from, until: from, ..Watch::default() });
        Ok(watches.len() - 1)
    })
    .await?
}

async fn list(client: &mut Client) -> anyhow::Result<Revision> {
    let body = client.insist(&format!("{}?{WRITTEN}", maps())).await?;
    let list: Value = serde_json::from_slice(&body)?;
    revision(&list).ok_or_else(|| anyhow::anyhow!("a list without a resourceVersion"))
}

/// Watches until `stop`.
pub async fn run(way: Way, recorder: Recorder, number: usize, stop: CancellationToken) {
    let mut client = way.client();
    let path = format!("{}?{WRITTEN}", maps());
    while !stop.is_cancelled() {
        let from = recorder.history().watches[number].until;
        let told = |what: Told<'_>, revision: Revision| {
            let at = recorder.now();
            let watch = &mut recorder.history().watches[number];
            if let Told::Change(kind, object) = what
                && let Some(name) = object["metadata"]["name"].as_str()
            {
                let value = if kind == "DELETED" { None } else { seen(object).map(|s| s.value) };
                watch.events.push(WatchEvent { at, key: name.into(), value, revision });
            }
            watch.until = watch.until.max(revision);
        };
        let end = tokio::select! {
            end = follow(&mut client, &path, from, way.patience, told) => end,
            () = stop.cancelled() => return,
        };
        if let End::Gone(why) = end {
            let at = recorder.now();
            let until = match list(&mut client).await {
                Ok(revision) => revision,
                // The next attempt lists again.
                Err(_) => continue,
            };
            let watch = &mut recorder.history().watches[number];
            watch.began_again.push((at, why));
            watch.until = until;
        }
        // At once, as a client does that was watching; but not in a tight loop.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
