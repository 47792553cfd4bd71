//! `guild certs`: a CA of one's own and certificates for the roles of a cluster.
//!
//! For development and for clusters without a CA; what is checked is only what is written in
//! [`Identity`], so any CA can issue the same.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use guild_node::ExitKind;
use guild_node::tls::{Identity, Role, Tls, TlsFiles};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};

use crate::args::Certs;
use crate::failure::Failure;

/// Validity of the CA.
const CA_DAYS: i64 = 3650;
/// Certificates are valid from a little before they are made: clocks differ.
const SKEW: Duration = Duration::hours(1);
/// Only the owner may read a key.
const KEY_MODE: u32 = 0o600;
/// Everybody may read a certificate.
const CERT_MODE: u32 = 0o644;

/// A file to be.
struct Output {
    path: PathBuf,
    text: String,
    mode: u32,
}

pub(crate) fn run(args: &Certs) -> Result<(), Failure> {
    let identities = identities(args)?;
    std::fs::create_dir_all(&args.out).map_err(|error| {
        let message = format!("--out: {}: {error}", args.out.display());
        Failure::new(ExitKind::Resources, message)
    })?;
    let ca = Ca::of(args)?;
    let mut outputs = Vec::new();
    outputs.extend(ca.outputs);
    let mut made = Vec::new();
    for identity in &identities {
        let (cert, key) = issue(args, identity, &ca.params, &ca.key).map_err(|error| {
            Failure::usage(format!("--hosts: no certificate can be made: {error}"))
        })?;
        let stem = identity.name.as_deref().unwrap_or(identity.role.as_str());
        let files = TlsFiles {
            cert: args.out.join(format!("{stem}.pem")),
            key: args.out.join(format!("{stem}.key")),
            ca: args.out.join("ca.pem"),
        };
        outputs.push(Output {
            path: files.cert.clone(),
            text: cert,
            mode: CERT_MODE,
        });
        outputs.push(Output {
            path: files.key.clone(),
            text: key,
            mode: KEY_MODE,
        });
        made.push((files, identity));
    }
    if let Some(taken) = outputs.iter().find(|output| output.path.exists()) {
        return Err(Failure::usage(format!(
            "{} exists and is not overwritten",
            taken.path.display()
        ))
        .hint("choose another --out, or move the old files away"));
    }
    for output in &outputs {
        write(output)?;
    }
    // What does not work is not left lying about.
    for (files, identity) in &made {
        if let Err(error) = Tls::open(files.clone(), identity.role) {
            for output in &outputs {
                let _ = std::fs::remove_file(&output.path);
            }
            return Err(Failure::of(&error).hint("is the CA in --out one of the same --cluster?"));
        }
    }
    explain(args, &made)
}

/// Whom certificates are asked for.
fn identities(args: &Certs) -> Result<Vec<Identity>, Failure> {
    let identity = |role: Role, name: Option<&str>| {
        Identity::new(&args.cluster, role, name)
            .map_err(|error| Failure::usage(format!("--cluster or --name: {error}")))
    };
    match (args.role, args.name.as_slice()) {
        (None, []) => Role::ALL
            .into_iter()
            .map(|role| identity(role, None))
            .collect(),
        (None, _) => Err(Failure::usage("--name needs --role: which role has it?")),
        (Some(role), []) => Ok(vec![identity(role, None)?]),
        (Some(role), names) => names
            .iter()
            .map(|name| identity(role, Some(name)))
            .collect(),
    }
}

struct Ca {
    params: CertificateParams,
    key: KeyPair,
    /// Its files, if it is new.
    outputs: Vec<Output>,
}

impl Ca {
    /// The CA that is in the folder, else a new one.
    fn of(args: &Certs) -> Result<Ca, Failure> {
        let (cert_path, key_path) = (args.out.join("ca.pem"), args.out.join("ca.key"));
        let unusable = |error: &dyn std::fmt::Display| {
            Failure::new(ExitKind::Config, format!("{}: {error}", key_path.display()))
        };
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = DistinguishedName::new();
        // Named after the cluster alone, so that the key is all that has to be kept to issue more.
        let name = format!("Guild CA of {}", args.cluster);
        params.distinguished_name.push(DnType::CommonName, name);
        validity(&mut params, CA_DAYS);
        if cert_path.exists() && key_path.exists() {
            let pem = std::fs::read_to_string(&key_path).map_err(|error| unusable(&error))?;
            let key = KeyPair::from_pem(&pem).map_err(|error| unusable(&error))?;
            return Ok(Ca {
                params,
                key,
                outputs: Vec::new(),
            });
        }
        let key = KeyPair::generate().map_err(|error| unusable(&error))?;
        let cert = params.self_signed(&key).map_err(|error| unusable(&error))?;
        let outputs = vec![
            Output {
                path: cert_path,
                text: cert.pem(),
                mode: CERT_MODE,
            },
            Output {
                path: key_path,
                text: key.serialize_pem(),
                mode: KEY_MODE,
            },
        ];
        Ok(Ca {
            params,
            key,
            outputs,
        })
    }
}

/// Certificate and key of one node, in PEM.
fn issue(
    args: &Certs,
    identity: &Identity,
    ca: &CertificateParams,
    ca_key: &KeyPair,
) -> Result<(String, String), rcgen::Error> {
    let mut hosts = args.hosts.clone();
    if args.anywhere {
        hosts.push(identity.anywhere());
    }
    let mut params = CertificateParams::new(hosts)?;
    let uri = SanType::URI(identity.to_string().as_str().try_into()?);
    params.subject_alt_names.push(uri);
    params.distinguished_name = DistinguishedName::new();
    let name = identity.name.as_deref().unwrap_or(identity.role.as_str());
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = match identity.role {
        // Nobody dials an operator.
        Role::Operator => vec![ExtendedKeyUsagePurpose::ClientAuth],
        _ => vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ],
    };
    validity(&mut params, args.days.into());
    let key = KeyPair::generate()?;
    let cert = params.signed_by(&key, &Issuer::from_params(ca, ca_key))?;
    Ok((cert.pem(), key.serialize_pem()))
}

fn validity(params: &mut CertificateParams, days: i64) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - SKEW;
    params.not_after = now + Duration::days(days);
}

/// Writes a file that is not there yet, with its mode from the first byte on.
fn write(output: &Output) -> Result<(), Failure> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(output.mode)
        .open(&output.path)
        .and_then(|mut file| file.write_all(output.text.as_bytes()))
        .map_err(|error| {
            let message = format!("{}: {error}", output.path.display());
            Failure::new(ExitKind::Resources, message)
        })
}

fn explain(args: &Certs, made: &[(TlsFiles, &Identity)]) -> Result<(), Failure> {
    let mut stdout = std::io::stdout();
    for identity in made.iter().map(|(_, identity)| identity) {
        let command = match identity.role {
            Role::Coordinator => "coordinator",
            Role::Attention => "attention-node",
            Role::Expert => "expert-node",
            Role::Operator => "experts ls",
        };
        let name = match &identity.name {
            Some(name) if identity.role != Role::Operator => format!(" --name {name}"),
            _ => String::new(),
        };
        let folder = args.out.display();
        writeln!(stdout, "guild {command}{name} --tls-dir {folder} …")?;
    }
    writeln!(
        stdout,
        "\nThe certificates are good for {} days at {}{}, in the cluster `{}`.\n\
         {} signs more of them: keep it away from the nodes.",
        args.days,
        args.hosts.join(", "),
        if args.anywhere { " and elsewhere" } else { "" },
        args.cluster,
        args.out.join("ca.key").display()
    )?;
    Ok(stdout.flush()?)
}
