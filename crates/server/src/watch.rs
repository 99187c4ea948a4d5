//! WATCH (<https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes>): what is asked for.
//! The answer is a [`Watcher`](stream::Watcher).

mod stream;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Response, header};
use http_body_util::{BodyExt, Full};
use rand::Rng;
use seawall_api::Scope;
use seawall_store::Revision;

use self::stream::{Ends, Form, Watcher};
use crate::{
    Context, Server,
    cache::{Interest, by_node},
    encode::{Body, Include},
    error::{ApiError, Result},
    object::Object,
    read::{Selection, resource_version},
};

impl Server {
    /// WATCH of a resource, or of one object.
    pub(crate) async fn watch(self: &Arc<Self>, context: &Context<'_>) -> Result<Response<Body>> {
        let query = &context.query;
        let row = context.row.clone();
        let id = context.served.id;
        let selection = Selection::parse(&row, query, context.path.name.as_deref())?;
        let requested = resource_version(query)?;
        let initial_events = query.flag("sendInitialEvents");
        let bookmarks = query.flag("allowWatchBookmarks");
        match (query.text("resourceVersionMatch"), query.get("sendInitialEvents")) {
            (None, None) | (Some("NotOlderThan"), Some(_)) => {}
            (None, Some(_)) => {
                return Err(ApiError::bad_request(
                    "resourceVersionMatch: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
                ));
            }
            (Some(_), None) => {
                return Err(ApiError::bad_request(
                    "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
                ));
            }
            (Some(other), Some(_)) => {
                return Err(ApiError::bad_request(format!(
                    "resourceVersionMatch: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan, found {other:?}"
                )));
            }
        }
        let prefix = match (context.path.namespace.as_deref(), row.scope) {
            (Some(namespace), Scope::Namespaced) => format!("{}{namespace}/", row.prefix()),
            _ => row.prefix(),
        };
        // Without a version, or with "0", a watch starts with what exists.
        let with_initial = initial_events || matches!(requested, None | Some(Revision(0)));
        let snapshot = match requested {
            Some(revision) => self.cache.at_least(revision).await?,
            None => self.consistent().await?,
        };
        let (initial, after) = if with_initial && query.get("sendInitialEvents") != Some("false") {
            let picked = |o: &&Arc<Object>| selection.picks(&row, o);
            let objects = match snapshot.by_node(id).zip(selection.equal(by_node::FIELD)) {
                Some((pods, node)) => pods.on(node, &prefix, None).filter(picked).cloned().collect(),
                None => snapshot.range(id, &prefix, None).filter(picked).cloned().collect(),
            };
            (objects, snapshot.revision)
        } else {
            let after = requested.filter(|r| r.0 > 0).unwrap_or(snapshot.revision);
            let oldest = self.cache.oldest(id);
            if after < oldest {
                // Clients expect this as the first event of a watch that began well.
                let error = ApiError::expired(format!("too old resource version: {after} ({oldest})"));
                let encoder = context.encoder()?;
                let only = Full::new(encoder.error(&error)).map_err(|never| match never {});
                return Ok(answer(only, encoder.stream_type()));
            }
            (VecDeque::new(), after)
        };
        let timeout = match query.number::<u64>("timeoutSeconds")? {
            Some(seconds) if seconds > 0 => Duration::from_secs(seconds.min(86_400)),
            // Spread, so that watchers do not all come back at the same time.
            _ => Duration::from_secs(rand::rng().random_range(1800..3600)),
        };
        let initial = match initial.is_empty() {
            true => initial,
            false => self.in_version(&row, initial.into()).await?.into(),
        };
        let namespace = match row.scope {
            Scope::Namespaced => context.path.namespace.as_deref(),
            Scope::Cluster => Some(""),
        };
        let interest = match (selection.equal("metadata.name"), selection.equal(by_node::FIELD), namespace) {
            (Some(name), _, Some(namespace)) => Interest::Key(row.key(namespace, name)),
            (_, Some(node), _) if snapshot.by_node(id).is_some() => Interest::Node(node.to_owned()),
            (_, _, Some(_)) if row.scope == Scope::Namespaced => Interest::Key(prefix.clone()),
            _ => Interest::Everything,
        };
        let form = Form {
            row,
            served: context.served.clone(),
            form: context.form,
            include: Include::parse(query.get("includeObject"))?,
            server: self.clone(),
        };
        let kind = form.encoder().stream_type();
        let ends = Ends { timeout, bookmarks, initial_end: initial_events && bookmarks };
        let subscription = self.cache.subscribe(id, after, interest);
        let watcher = Watcher::new(form, selection, prefix, subscription, initial, ends);
        Ok(answer(watcher, kind))
    }
}

fn answer(
    body: impl http_body::Body<Data = Bytes, Error = crate::BodyError> + Send + 'static,
    kind: header::HeaderValue,
) -> Response<Body> {
    let mut response = Response::new(body.boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
