//! From bytes to a question, and from an answer to bytes. Pure.

use hickory_proto::{
    op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode},
    rr::{DNSClass, Record, RecordType},
    serialize::binary::{BinEncodable, BinEncoder},
};

/// The largest datagram that we send and ask others for: it is not taken apart on any usual way.
pub const MOST_UDP: u16 = 1232;
/// What everybody can take.
const LEAST_UDP: u16 = 512;
/// The largest question that is looked at.
pub const MOST_QUERY: usize = 4096;
/// What a header takes.
const HEADER: usize = 12;

/// How a question came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// As a datagram: answers have to fit into one.
    Udp,
    /// On a connection.
    Tcp,
}

/// A question that can be answered.
#[derive(Clone, Debug)]
pub struct Asked {
    /// What of its header goes into the answer.
    pub metadata: Metadata,
    /// What is asked.
    pub query: Query,
    /// Whether the client speaks EDNS, so that the answer has to.
    pub edns: bool,
    /// Whether it wants signatures.
    pub dnssec: bool,
    /// The largest answer that it takes.
    pub most: u16,
}

/// What there is to do with bytes.
#[derive(Debug)]
pub enum Read {
    /// To answer.
    Asked(Box<Asked>),
    /// To send this back.
    Refused(Vec<u8>, ResponseCode),
    /// Nothing: it is no question. To answer answers would let two servers talk forever.
    Nothing,
}

/// Reads a question.
pub fn read(bytes: &[u8], transport: Transport) -> Read {
    let [high, low, flags, _, rest @ ..] = bytes else { return Read::Nothing };
    if bytes.len() < HEADER || flags & 0x80 != 0 {
        return Read::Nothing;
    }
    let id = u16::from_be_bytes([*high, *low]);
    let code = OpCode::from_u8((flags >> 3) & 0xf);
    if code != OpCode::Query {
        return refuse(id, code, ResponseCode::NotImp);
    }
    // One question, as everybody sends; what counts of the rest is EDNS alone.
    let questions = u16::from_be_bytes([rest[0], rest[1]]);
    if questions != 1 || bytes.len() > MOST_QUERY {
        return refuse(id, code, ResponseCode::FormErr);
    }
    let Ok(message) = Message::from_vec(bytes) else { return refuse(id, code, ResponseCode::FormErr) };
    let Message { metadata, mut queries, edns, .. } = message;
    let Some(query) = queries.pop() else { return refuse(id, code, ResponseCode::FormErr) };
    let most = match (transport, &edns) {
        (Transport::Tcp, _) => u16::MAX,
        (Transport::Udp, None) => LEAST_UDP,
        (Transport::Udp, Some(edns)) => edns.max_payload().clamp(LEAST_UDP, MOST_UDP),
    };
    let dnssec = edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok);
    let asked = Asked { metadata, query, edns: edns.is_some(), dnssec, most };
    let refused = |code| Read::Refused(asked.write(Response::code(code)), code);
    if edns.is_some_and(|edns| edns.version() != 0) {
        return refused(ResponseCode::BADVERS);
    }
    if asked.query.query_class != DNSClass::IN {
        return refused(ResponseCode::Refused);
    }
    match asked.query.query_type {
        // There is no zone to hand out.
        RecordType::AXFR | RecordType::IXFR => refused(ResponseCode::Refused),
        RecordType::OPT | RecordType::TSIG => refused(ResponseCode::FormErr),
        _ => Read::Asked(Box::new(asked)),
    }
}

fn refuse(id: u16, op: OpCode, code: ResponseCode) -> Read {
    let mut message = Message::response(id, op);
    message.metadata.response_code = code;
    // A header alone always fits.
    message.to_vec().map_or(Read::Nothing, |bytes| Read::Refused(bytes, code))
}

/// An answer before it is written.
#[derive(Clone, Debug, PartialEq)]
pub struct Response {
    /// How it went.
    pub code: ResponseCode,
    /// Whether it is ours to say.
    pub authoritative: bool,
    /// Whether somebody has proven it.
    pub authentic: bool,
    /// What was asked for.
    pub answers: Vec<Record>,
    /// Who says so, or how long nothing will be there.
    pub authorities: Vec<Record>,
    /// What will be asked for next.
    pub additionals: Vec<Record>,
}

impl Response {
    /// Nothing but how it went.
    pub fn code(code: ResponseCode) -> Response {
        Response {
            code,
            authoritative: false,
            authentic: false,
            answers: Vec::new(),
            authorities: Vec::new(),
            additionals: Vec::new(),
        }
    }
}

impl Asked {
    /// Writes an answer. What does not fit is left out: what was not asked for first; and the client is told, if it was
    /// asked for, so that it comes by TCP.
    pub fn write(&self, response: Response) -> Vec<u8> {
        let mut metadata = Metadata::response_from_request(&self.metadata);
        metadata.recursion_available = true;
        metadata.authoritative = response.authoritative;
        metadata.authentic_data = response.authentic && (self.dnssec || self.metadata.authentic_data);
        metadata.response_code = response.code;
        let mut message = Message::new(metadata.id, MessageType::Response, metadata.op_code);
        message.metadata = metadata;
        message.add_query(self.query.clone());
        message.answers = response.answers;
        message.authorities = response.authorities;
        message.additionals = response.additionals;
        if self.edns {
            let mut edns = Edns::new();
            edns.set_max_payload(MOST_UDP);
            edns.set_dnssec_ok(self.dnssec);
            message.set_edns(edns);
        }
        let most = usize::from(self.most);
        loop {
            match encode(&message) {
                Some(bytes) if bytes.len() <= most => return bytes,
                _ if !message.additionals.is_empty() => message.additionals.clear(),
                _ if !message.authorities.is_empty() && !message.answers.is_empty() => message.authorities.clear(),
                _ if !message.answers.is_empty() || !message.authorities.is_empty() => {
                    message.metadata.truncation = true;
                    message.authorities.clear();
                    let half = message.answers.len() / 2;
                    message.answers.truncate(half);
                }
                // Not even the question: cannot be, since it was read from less.
                _ => return self.bare(),
            }
        }
    }

    fn bare(&self) -> Vec<u8> {
        let message = Message::error_msg(self.metadata.id, self.metadata.op_code, ResponseCode::ServFail);
        message.to_vec().unwrap_or_default()
    }
}

fn encode(message: &Message) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(512);
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_max_size(u16::MAX);
    message.emit(&mut encoder).ok()?;
    // The encoder leaves out what does not fit and says so in the header.
    (bytes.get(2).is_some_and(|flags| flags & 0x02 == 0) || message.metadata.truncation).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use hickory_proto::rr::{Name, RData, rdata::A};
    use proptest::prelude::*;

    use super::*;

    fn question(edns: Option<u16>) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_str("a.example.").unwrap(), RecordType::A));
        if let Some(size) = edns {
            message.set_edns(Edns::new().set_max_payload(size).clone());
        }
        message.to_vec().unwrap()
    }

    fn asked(bytes: &[u8], transport: Transport) -> Asked {
        match read(bytes, transport) {
            Read::Asked(asked) => *asked,
            other => panic!("{other:?}"),
        }
    }

    fn response(count: usize) -> Response {
        let name = Name::from_str("a.example.").unwrap();
        let answers =
            (0..count).map(|i| Record::from_rdata(name.clone(), 5, RData::A(A(std::net::Ipv4Addr::from(i as u32)))));
        Response { answers: answers.collect(), ..Response::code(ResponseCode::NoError) }
    }

    #[test]
    fn answers_fit_the_client() {
        let check = |edns: Option<u16>, transport: Transport, count: usize, most: usize, cut: bool| {
            let asked = asked(&question(edns), transport);
            let bytes = asked.write(response(count));
            let message = Message::from_vec(&bytes).unwrap();
            assert!(bytes.len() <= most, "{} bytes for {edns:?}", bytes.len());
            assert_eq!(message.metadata.truncation, cut, "{count} for {edns:?} by {transport:?}");
            assert_eq!(message.answers.len() == count, !cut);
            assert_eq!(message.edns.is_some(), edns.is_some());
            assert_eq!((message.metadata.id, message.metadata.recursion_desired), (7, true));
        };
        check(None, Transport::Udp, 20, 512, false);
        check(None, Transport::Udp, 40, 512, true);
        check(Some(4096), Transport::Udp, 40, 1232, false);
        check(Some(4096), Transport::Udp, 100, 1232, true);
        check(Some(100), Transport::Udp, 40, 512, true);
        check(None, Transport::Tcp, 2000, 65535, false);
        check(None, Transport::Tcp, 5000, 65535, true);
    }

    #[test]
    fn what_was_not_asked_for_goes_first() {
        let asked = asked(&question(None), Transport::Udp);
        let mut long = response(20);
        long.additionals = response(20).answers;
        let message = Message::from_vec(&asked.write(long)).unwrap();
        assert_eq!((message.answers.len(), message.additionals.len(), message.metadata.truncation), (20, 0, false));
    }

    #[test]
    fn what_is_no_question() {
        let good = question(Some(1232));
        let check = |change: &dyn Fn(&mut Vec<u8>), expect: Option<ResponseCode>| {
            let mut bytes = good.clone();
            change(&mut bytes);
            match (read(&bytes, Transport::Udp), expect) {
                (Read::Nothing, None) => {}
                (Read::Refused(answer, code), Some(expect)) => {
                    assert_eq!(code, expect);
                    let answer = Message::from_vec(&answer).unwrap();
                    // Two codes have one number.
                    let number = |code: ResponseCode| u16::from(code);
                    assert_eq!((answer.metadata.id, number(answer.metadata.response_code)), (7, number(expect)));
                    assert_eq!(answer.metadata.message_type, MessageType::Response);
                }
                (other, _) => panic!("{other:?} instead of {expect:?}"),
            }
        };
        check(&|b| b.truncate(11), None);
        check(&|b| b.clear(), None);
        check(&|b| b[2] |= 0x80, None);
        check(&|b| b[2] |= 0x28, Some(ResponseCode::NotImp));
        check(&|b| b[5] = 2, Some(ResponseCode::FormErr));
        check(&|b| b[5] = 0, Some(ResponseCode::FormErr));
        check(&|b| b.truncate(14), Some(ResponseCode::FormErr));
        check(&|b| b[12] = 0xc0, Some(ResponseCode::FormErr));
        check(&|b| b.resize(MOST_QUERY + 1, 0), Some(ResponseCode::FormErr));
        // The version of EDNS is the sixth byte of its record, which is the last eleven.
        check(
            &|b| {
                let at = b.len() - 5;
                b[at] = 1;
            },
            Some(ResponseCode::BADVERS),
        );
        // Class CHAOS, and a zone's transfer.
        check(&|b| b[26] = 3, Some(ResponseCode::Refused));
        check(&|b| b[24] = 252, Some(ResponseCode::Refused));
    }

    proptest! {
        #[test]
        fn any_bytes_are_borne(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            bear(&bytes);
        }

        #[test]
        fn broken_questions_are_borne(
            at in 0usize..40, byte in any::<u8>(), cut in 0usize..60, more in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut bytes = question(Some(1232));
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(cut.max(12));
            bytes.extend(more);
            bear(&bytes);
        }
    }

    /// Whatever comes, what goes out is no question and not too long.
    fn bear(bytes: &[u8]) {
        for transport in [Transport::Udp, Transport::Tcp] {
            let out = match read(bytes, transport) {
                Read::Asked(asked) => asked.write(response(50)),
                Read::Refused(out, _) => out,
                Read::Nothing => continue,
            };
            let message = Message::from_vec(&out).unwrap();
            assert_eq!(message.metadata.message_type, MessageType::Response);
            assert!(transport == Transport::Tcp || out.len() <= usize::from(MOST_UDP));
        }
    }
}
