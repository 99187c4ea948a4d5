//! Container logs: CRI's log format, and the options of `kubectl logs`.

use std::{os::unix::fs::MetadataExt, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use jiff::Timestamp;
use tokio::{
    fs::File,
    io::{AsyncBufReadExt, AsyncReadExt, AsyncSeekExt, BufReader, SeekFrom},
    sync::mpsc,
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

use super::{Body, Query, find_pod, find_status, refuse};
use crate::{Agent, pod::observed::State};

/// One entry of a log file.
#[derive(Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// When it was written, as it stands in the file.
    pub time: &'a str,
    /// `stdout` or `stderr`.
    pub stream: &'a str,
    /// Whether the container's line goes on in the next entry.
    pub partial: bool,
    /// Without the newline.
    pub content: &'a [u8],
}

/// Parses `<time> <stream> <P|F> <content>`.
/// <https://github.com/kubernetes/design-proposals-archive/blob/main/node/kubelet-cri-logging.md>
pub fn parse(line: &[u8]) -> Option<Line<'_>> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut parts = line.splitn(4, |b| *b == b' ');
    let time = std::str::from_utf8(parts.next()?).ok()?;
    let stream = std::str::from_utf8(parts.next()?).ok().filter(|s| matches!(*s, "stdout" | "stderr"))?;
    let tag = parts.next()?;
    Some(Line {
        time,
        stream,
        partial: tag.split(|b| *b == b':').next() == Some(b"P"),
        content: parts.next().unwrap_or_default(),
    })
}

/// What of a log is wanted.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Go on until the container ends.
    pub follow: bool,
    /// Only the last lines.
    pub tail: Option<usize>,
    /// Only what was written from then on.
    pub since: Option<Timestamp>,
    /// Put the time before each line.
    pub timestamps: bool,
    /// End after this many bytes.
    pub limit: Option<usize>,
    /// Only this stream.
    pub stream: Option<String>,
}

impl Options {
    fn from_query(query: &Query, now: Timestamp) -> Result<Self, String> {
        let number = |name: &str| match query.get(name).filter(|v| !v.is_empty()) {
            None => Ok(None),
            Some(text) => {
                text.parse::<i64>().map(Some).map_err(|_| format!("{name}: invalid value {text:?}: must be an integer"))
            }
        };
        let since =
            match (query.get("sinceTime").filter(|v| !v.is_empty()), number("sinceSeconds")?) {
                (Some(text), _) => Some(text.parse().map_err(|_| {
                    format!("sinceTime: invalid value {text:?}: must be a time like 2024-01-02T03:04:05Z")
                })?),
                (None, Some(seconds)) if seconds >= 1 => Some(now - Duration::from_secs(seconds.unsigned_abs())),
                (None, Some(seconds)) => {
                    return Err(format!("sinceSeconds: invalid value {seconds}: must be greater than 0"));
                }
                (None, None) => None,
            };
        let tail = number("tailLines")?
            .map(|n| usize::try_from(n).map_err(|_| format!("tailLines: invalid value {n}: must not be negative")));
        let limit = number("limitBytes")?.map(|n| {
            usize::try_from(n)
                .ok()
                .filter(|n| *n > 0)
                .ok_or(format!("limitBytes: invalid value {n}: must be greater than 0"))
        });
        let stream = query.get("stream").filter(|s| !s.is_empty() && *s != "All").map(str::to_ascii_lowercase);
        Ok(Self {
            follow: query.flag(&["follow"]),
            tail: tail.transpose()?,
            since,
            timestamps: query.flag(&["timestamps"]),
            limit: limit.transpose()?,
            stream,
        })
    }
}

/// Turns log entries into output, up to the limit.
struct Printer {
    options: Options,
    left: usize,
}

impl Printer {
    fn new(options: Options) -> Self {
        let left = options.limit.unwrap_or(usize::MAX);
        Self { options, left }
    }

    /// Appends what an entry contributes; false when the limit is reached.
    fn print(&mut self, raw: &[u8], out: &mut Vec<u8>) -> bool {
        // A line that is not in CRI's format is shown as it is rather than lost.
        let Some(line) = parse(raw) else { return self.push(&[raw], out) };
        if self.options.since.is_some_and(|since| line.time.parse::<Timestamp>().is_ok_and(|at| at < since))
            || self.options.stream.as_ref().is_some_and(|s| s != line.stream)
        {
            return true;
        }
        let stamp = if self.options.timestamps { [line.time.as_bytes(), b" "] } else { [&[][..], b""] };
        let end: &[u8] = if line.partial { b"" } else { b"\n" };
        self.push(&[stamp[0], stamp[1], line.content, end], out)
    }

    fn push(&mut self, parts: &[&[u8]], out: &mut Vec<u8>) -> bool {
        for part in parts {
            let take = part.len().min(self.left);
            out.extend_from_slice(&part[..take]);
            self.left -= take;
        }
        self.left > 0
    }
}

/// The position of the last `lines` lines of a file.
async fn tail_position(file: &mut File, lines: usize) -> std::io::Result<u64> {
    const CHUNK: u64 = 64 << 10;
    let length = file.metadata().await?.len();
    if lines == 0 {
        return Ok(length);
    }
    let (mut end, mut found) = (length, 0);
    let mut buffer = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(CHUNK);
        buffer.resize((end - start) as usize, 0);
        file.seek(SeekFrom::Start(start)).await?;
        file.read_exact(&mut buffer).await?;
        for (index, byte) in buffer.iter().enumerate().rev() {
            let position = start + index as u64;
            // The newline at the very end closes the last line; it does not begin another.
            if *byte == b'\n' && position + 1 < length {
                found += 1;
                if found == lines {
                    return Ok(position + 1);
                }
            }
        }
        end = start;
    }
    Ok(0)
}

/// Reads a log file and sends what the options select. `running` says whether more may come.
pub async fn read(
    path: &Path,
    options: Options,
    running: impl Fn() -> bool,
    out: mpsc::Sender<Bytes>,
) -> std::io::Result<()> {
    let mut file = File::open(path).await?;
    let start = match options.tail {
        Some(lines) => tail_position(&mut file, lines).await?,
        None => 0,
    };
    file.seek(SeekFrom::Start(start)).await?;
    let mut inode = file.metadata().await?.ino();
    let follow = options.follow;
    let mut printer = Printer::new(options);
    let mut reader = BufReader::with_capacity(64 << 10, file);
    let (mut line, mut text) = (Vec::new(), Vec::new());
    let mut ended = false;
    loop {
        let read = reader.read_until(b'\n', &mut line).await?;
        if read > 0 && line.ends_with(b"\n") {
            let more = printer.print(&line, &mut text);
            line.clear();
            let full = !more || text.len() >= 32 << 10;
            if full && (out.send(Bytes::from(std::mem::take(&mut text))).await.is_err() || !more) {
                return Ok(());
            }
            continue;
        }
        if !text.is_empty() && out.send(Bytes::from(std::mem::take(&mut text))).await.is_err() {
            return Ok(());
        }
        // At the end of the file. If it was moved away, the new one goes on where it ended.
        let current = tokio::fs::metadata(path).await.map(|m| m.ino());
        if !follow || ended && !matches!(current, Ok(now) if now != inode) {
            if !line.is_empty() {
                printer.print(&line, &mut text);
                let _ = out.send(Bytes::from(text)).await;
            }
            return Ok(());
        }
        match current {
            Ok(now) if now != inode && line.is_empty() => {
                let file = File::open(path).await?;
                inode = file.metadata().await?.ino();
                reader = BufReader::with_capacity(64 << 10, file);
                continue;
            }
            _ => {}
        }
        // One more pass after the container's end: its last words may not have been read yet.
        ended = !running();
        if !ended {
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
                () = out.closed() => return Ok(()),
            }
        }
    }
}

/// The last lines of a log as text, at most `bytes` of them.
pub async fn tail(path: &Path, lines: usize, bytes: usize) -> std::io::Result<String> {
    let (sender, mut receiver) = mpsc::channel::<Bytes>(16);
    let options = Options { tail: Some(lines), ..Default::default() };
    let collect = async {
        let mut all = Vec::new();
        while let Some(part) = receiver.recv().await {
            all.extend_from_slice(&part);
        }
        all
    };
    let (result, all) = tokio::join!(read(path, options, || false, sender), collect);
    result?;
    Ok(String::from_utf8_lossy(&all[all.len().saturating_sub(bytes)..]).into_owned())
}

/// Which container's log is meant, in upstream's words where there is none.
fn container_id(
    status: &k8s_openapi::api::core::v1::ContainerStatus,
    pod: &str,
    container: &str,
    previous: bool,
) -> Result<String, String> {
    let state = status.state.clone().unwrap_or_default();
    let last = status.last_state.as_ref().and_then(|l| l.terminated.as_ref()).and_then(|t| t.container_id.clone());
    let bare = |id: String| id.split_once("://").map(|(_, id)| id.to_owned()).unwrap_or(id);
    if previous {
        return last
            .map(bare)
            .ok_or_else(|| format!("previous terminated container {container:?} in pod {pod:?} not found"));
    }
    if state.running.is_some() {
        return status
            .container_id
            .clone()
            .map(bare)
            .ok_or_else(|| format!("container {container:?} in pod {pod:?} is not available"));
    }
    if let Some(id) = state.terminated.and_then(|t| t.container_id).or(last) {
        return Ok(bare(id));
    }
    let reason = state.waiting.and_then(|w| w.reason).unwrap_or_default();
    Err(match reason.as_str() {
        "ErrImagePull" => format!("container {container:?} in pod {pod:?} is waiting to start: image can't be pulled"),
        "ImagePullBackOff" => {
            format!("container {container:?} in pod {pod:?} is waiting to start: trying and failing to pull image")
        }
        other => format!("container {container:?} in pod {pod:?} is waiting to start: {other}"),
    })
}

/// `GET /containerLogs/{namespace}/{pod}/{container}`
pub async fn handle(agent: Arc<Agent>, namespace: &str, pod: &str, container: &str, query: &Query) -> Response<Body> {
    let options = match Options::from_query(query, Timestamp::now()) {
        Ok(options) => options,
        Err(message) => return refuse(StatusCode::BAD_REQUEST, message),
    };
    let Some((found, status)) = find_pod(&agent, namespace, pod) else {
        return refuse(StatusCode::NOT_FOUND, format!("pod {pod:?} in namespace {namespace:?} is not on this node"));
    };
    let Some(status) = find_status(&status, container) else {
        return refuse(StatusCode::NOT_FOUND, format!("container {container:?} not found in pod {pod:?}"));
    };
    let id = match container_id(status, pod, container, query.flag(&["previous"])) {
        Ok(id) => id,
        Err(message) => return refuse(StatusCode::BAD_REQUEST, message),
    };
    let path = match agent.cri.container_status(&id).await {
        Ok(Some(status)) if !status.log_path.is_empty() => status.log_path,
        Ok(_) => {
            return refuse(StatusCode::NOT_FOUND, format!("unable to retrieve container logs for containerd://{id}"));
        }
        Err(status) => return refuse(StatusCode::INTERNAL_SERVER_ERROR, status.message()),
    };
    let uid = crate::pod::uid(&found).to_owned();
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        let running = || {
            let pods = agent.pleg.pods();
            pods.get(&uid).is_some_and(|p| p.containers.iter().any(|c| c.id == id && c.state == State::Running))
        };
        if let Err(error) = read(Path::new(&path), options, running, sender).await {
            tracing::debug!(path, "read a log: {error}");
        }
    });
    let frames = ReceiverStream::new(receiver).map(|bytes| Ok::<_, std::io::Error>(Frame::data(bytes)));
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(frames)));
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("text/plain"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let line = parse(b"2024-01-01T00:00:00.1Z stdout F hello world\n").unwrap();
        assert_eq!((line.stream, line.partial, line.content), ("stdout", false, &b"hello world"[..]));
        assert!(parse(b"2024-01-01T00:00:00.1Z stderr P x").unwrap().partial);
        assert_eq!(parse(b"t stdout F ").unwrap().content, b"");
        assert!(parse(b"garbage").is_none());
        assert!(parse(b"").is_none());
    }

    const LOG: &str = "2024-01-01T00:00:01Z stdout F one\n2024-01-01T00:00:02Z stderr P tw\n2024-01-01T00:00:02Z stderr F o\n2024-01-01T00:00:03Z stdout F three\n";

    async fn show(log: &str, options: Options) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), log).unwrap();
        let (sender, mut receiver) = mpsc::channel(64);
        read(file.path(), options, || false, sender).await.unwrap();
        let mut all = Vec::new();
        while let Some(part) = receiver.recv().await {
            all.extend_from_slice(&part);
        }
        String::from_utf8(all).unwrap()
    }

    #[tokio::test]
    async fn options_select() {
        let o = Options::default;
        assert_eq!(show(LOG, o()).await, "one\ntwo\nthree\n");
        assert_eq!(show(LOG, Options { tail: Some(1), ..o() }).await, "three\n");
        assert_eq!(show(LOG, Options { tail: Some(0), ..o() }).await, "");
        assert_eq!(show(LOG, Options { tail: Some(99), ..o() }).await, "one\ntwo\nthree\n");
        let since = Some("2024-01-01T00:00:02Z".parse().unwrap());
        assert_eq!(show(LOG, Options { since, ..o() }).await, "two\nthree\n");
        assert_eq!(show(LOG, Options { limit: Some(5), ..o() }).await, "one\nt");
        assert_eq!(show(LOG, Options { stream: Some("stderr".into()), ..o() }).await, "two\n");
        assert_eq!(show(LOG, Options { timestamps: true, tail: Some(1), ..o() }).await, "2024-01-01T00:00:03Z three\n");
        // Longer than a chunk of the backward search.
        let long: String = (0..20_000).map(|i| format!("2024-01-01T00:00:01Z stdout F line {i}\n")).collect();
        assert_eq!(show(&long, Options { tail: Some(10_000), ..o() }).await.lines().next(), Some("line 10000"));
    }

    #[tokio::test]
    async fn following_survives_rotation() {
        use std::io::Write;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        std::fs::write(&path, "t stdout F 1\n").unwrap();
        let (sender, mut receiver) = mpsc::channel(64);
        let running = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let (at, flag) = (path.clone(), Arc::clone(&running));
        let options = Options { follow: true, ..Default::default() };
        let reader =
            tokio::spawn(
                async move { read(&at, options, || flag.load(std::sync::atomic::Ordering::SeqCst), sender).await },
            );
        assert_eq!(receiver.recv().await.unwrap(), "1\n");
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"t stdout F 2\n").unwrap();
        assert_eq!(receiver.recv().await.unwrap(), "2\n");
        std::fs::rename(&path, directory.path().join("0.log.old")).unwrap();
        std::fs::write(&path, "t stdout F 3\n").unwrap();
        assert_eq!(receiver.recv().await.unwrap(), "3\n");
        running.store(false, std::sync::atomic::Ordering::SeqCst);
        assert!(receiver.recv().await.is_none());
        reader.await.unwrap().unwrap();
    }

    #[test]
    fn bad_options_are_named() {
        let check = |query: &str| Options::from_query(&Query::parse(query), Timestamp::UNIX_EPOCH);
        assert!(check("tailLines=5&follow=true").unwrap().follow);
        for bad in ["tailLines=x", "tailLines=-1", "limitBytes=0", "sinceSeconds=0", "sinceTime=yesterday"] {
            let name = bad.split('=').next().unwrap();
            assert!(check(bad).unwrap_err().starts_with(name), "{bad}");
        }
    }
}
