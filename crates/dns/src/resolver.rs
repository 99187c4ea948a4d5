//! A question's way: the cluster's own names at once, what the cache has as well, and the rest later.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use arc_swap::ArcSwap;
use futures::future::BoxFuture;
use hickory_proto::op::ResponseCode;

use crate::{
    answer::Answer,
    forward::{Forwarder, Found},
    message::{self, Asked, Read, Response, Transport},
    metrics::{From, Metrics},
    zone::Zone,
};

/// What becomes of a question.
pub enum Outcome {
    /// This is to be sent.
    Now(Vec<u8>),
    /// Others have to be asked; the question, should there be no room for that.
    Later(Box<Asked>, BoxFuture<'static, Vec<u8>>),
    /// Nothing is to be sent.
    Nothing,
}

/// Answers questions.
pub struct Resolver {
    /// The cluster as it is.
    pub zone: Arc<ArcSwap<Zone>>,
    /// Who asks others.
    pub forwarder: Forwarder,
    /// What is counted.
    pub metrics: Metrics,
    turn: AtomicUsize,
}

impl Resolver {
    /// Of a cluster's names, and others'.
    pub fn new(zone: Arc<ArcSwap<Zone>>, forwarder: Forwarder, metrics: Metrics) -> Arc<Resolver> {
        Arc::new(Resolver { zone, forwarder, metrics, turn: AtomicUsize::new(0) })
    }

    /// Takes a question.
    pub fn take(&self, bytes: &[u8], transport: Transport) -> Outcome {
        self.metrics.asked(transport);
        let asked = match message::read(bytes, transport) {
            Read::Asked(asked) => asked,
            Read::Refused(answer, code) => {
                self.metrics.answered(code);
                return Outcome::Now(answer);
            }
            Read::Nothing => {
                self.metrics.dropped();
                return Outcome::Nothing;
            }
        };
        let (name, kind) = (&asked.query.name, asked.query.query_type);
        let turn = self.turn.fetch_add(1, Relaxed);
        let zone = self.zone.load();
        match zone.answer(name, kind, turn) {
            Answer::Found { answers, additionals } => {
                let authorities = if answers.is_empty() { vec![zone.authority()] } else { Vec::new() };
                let response = Response { answers, authorities, additionals, ..Response::code(ResponseCode::NoError) };
                self.own(&asked, response)
            }
            Answer::NoName => {
                let authorities = vec![zone.authority()];
                self.own(&asked, Response { authorities, ..Response::code(ResponseCode::NXDomain) })
            }
            Answer::Alias { records, target } => self.pass_on(asked, records, target),
            Answer::Elsewhere => {
                let name = name.clone();
                self.pass_on(asked, Vec::new(), name)
            }
        }
    }

    fn own(&self, asked: &Asked, response: Response) -> Outcome {
        self.metrics.from(From::Own);
        self.metrics.answered(response.code);
        Outcome::Now(asked.write(Response { authoritative: true, ..response }))
    }

    /// Others know. What the answer begins with is known.
    fn pass_on(
        &self,
        asked: Box<Asked>,
        first: Vec<hickory_proto::rr::Record>,
        name: hickory_proto::rr::Name,
    ) -> Outcome {
        let unchecked = asked.metadata.checking_disabled;
        let key = Forwarder::key(&name, asked.query.query_type, asked.dnssec, unchecked);
        let metrics = self.metrics.clone();
        let finish = move |asked: &Asked, mut response: Response| {
            metrics.answered(response.code);
            response.answers.splice(0..0, first);
            asked.write(response)
        };
        match self.forwarder.cached(&key) {
            Found::Now(response) => Outcome::Now(finish(&asked, response)),
            Found::Later => {
                let (forwarder, question) = (self.forwarder.clone(), asked.clone());
                let answer = async move { finish(&question, forwarder.ask(key).await) };
                Outcome::Later(asked, Box::pin(answer))
            }
        }
    }

    /// What a client is told that has too many questions under way: to try again.
    pub fn too_many(&self, asked: &Asked) -> Vec<u8> {
        self.metrics.refused();
        self.metrics.answered(ResponseCode::ServFail);
        asked.write(Response::code(ResponseCode::ServFail))
    }
}
