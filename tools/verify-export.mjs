// Verifies the records that `keyhold records export` or `keyhold-local run --export` wrote, with
// nothing of Keyhold: ethers for secp256k1, node:crypto for Ed25519, P-256 and RSA.
//
//   node tools/verify-export.mjs FILE
//
// It prints one line of JSON with counts, and on stderr what is wrong with the first records that are.
// Exit code 1: a signature is not valid, a record stands twice, or a line cannot be judged. Records
// without a signature are counted by their state and no failure.

import { createHash, createPublicKey, verify } from "node:crypto";
import { createReadStream } from "node:fs";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";
import { computeAddress, hashMessage, Signature, verifyMessage } from "ethers";

const SHOWN = 10; // failures that are explained; all are counted

/** What a key that is not secp256k1 signs for a record of kind message. */
function framed(payload) {
  return Buffer.concat([Buffer.from(`\x19Keyhold Signed Message:\n${payload.length}`), payload]);
}

function ecdsaP256(point) {
  const [x, y] = [point.subarray(1, 33), point.subarray(33)].map((n) => n.toString("base64url"));
  return { key: createPublicKey({ key: { kty: "EC", crv: "P-256", x, y }, format: "jwk" }), dsaEncoding: "ieee-p1363" };
}

function ed25519(raw) {
  return { key: createPublicKey({ key: { kty: "OKP", crv: "Ed25519", x: raw.toString("base64url") }, format: "jwk" }) };
}

function rsa(der) {
  return { key: createPublicKey({ key: der, format: "der", type: "spki" }) };
}

const hashed = {
  p256: { open: ecdsaP256, keyLength: 65, signatureLength: 64 },
  rsa2048: { open: rsa, signatureLength: 256 },
};

/** Returns why the signature of a secp256k1 message is not valid, or null. */
function secp256k1(line, payload, publicKey, signature) {
  if (signature.length !== 65 || ![27, 28].includes(signature[64])) return "the signature is not r||s||v with v 27 or 28";
  if (computeAddress(`0x${publicKey.toString("hex")}`) !== line.address) return "the address is not that of the public key";
  if (hashMessage(payload) !== `0x${line.digest}`) return "the digest is not that of the payload";
  // ethers refuses a high s here.
  const parsed = Signature.from(`0x${signature.toString("hex")}`);
  return verifyMessage(payload, parsed) === line.address ? null : "the signature is of another address";
}

/** Returns why the signature of a message under another algorithm is not valid, or null. */
function others(line, payload, publicKey, signature) {
  if (line.address !== null) return "an address where there can be none";
  const message = framed(payload);
  if (line.algorithm === "ed25519") {
    if (line.digest !== null) return "a digest where the scheme hashes itself";
    return verify(null, message, ed25519(publicKey).key, signature) ? null : "the signature is not valid";
  }
  const { open, keyLength, signatureLength } = hashed[line.algorithm];
  if (keyLength && publicKey.length !== keyLength) return "the public key has another length";
  if (signature.length !== signatureLength) return "the signature has another length";
  if (createHash("sha256").update(message).digest("hex") !== line.digest) return "the digest is not that of the payload";
  return verify("sha256", message, open(publicKey), signature) ? null : "the signature is not valid";
}

/** Bytes of hex, or an exception: Buffer.from stops silently at the first bad digit. */
function hex(text, what) {
  if (typeof text !== "string" || !/^([0-9a-f]{2})+$/.test(text)) throw new Error(`${what} is not lower-case hex`);
  return Buffer.from(text, "hex");
}

function check(line) {
  if (line.kind !== "message") return `kind ${line.kind} is not known here`;
  const payload = Buffer.from(line.payload, "base64");
  if (payload.toString("base64") !== line.payload) return "the payload is not base64";
  const publicKey = hex(line.public_key, "the public key");
  const signature = hex(line.signature, "the signature");
  if (line.algorithm === "secp256k1") return secp256k1(line, payload, publicKey, signature);
  if (line.algorithm === "ed25519" || Object.hasOwn(hashed, line.algorithm)) return others(line, payload, publicKey, signature);
  return `algorithm ${line.algorithm} is not known here`;
}

/** Verifies all lines of a file and returns the counts. */
export async function verifyExport(file, complain) {
  const count = { records: 0, verified: 0, failed: 0, keys: 0, states: {} };
  const ids = new Set();
  const keys = new Set();
  for await (const text of createInterface({ input: createReadStream(file), crlfDelay: Infinity })) {
    count.records++;
    let wrong = null;
    try {
      const line = JSON.parse(text);
      count.states[line.state] = (count.states[line.state] ?? 0) + 1;
      if (ids.has(line.record_id)) wrong = "the record stands twice";
      ids.add(line.record_id);
      if (line.state === "SIGNED") {
        keys.add(line.key_id);
        wrong ??= check(line);
        if (wrong === null) count.verified++;
      } else if (line.signature !== null) {
        wrong ??= `a signature in state ${line.state}`;
      }
    } catch (error) {
      wrong = error.message;
    }
    if (wrong !== null && ++count.failed <= SHOWN) complain(`line ${count.records}: ${wrong}`);
  }
  count.keys = keys.size;
  return count;
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) {
  if (process.argv.length !== 3) {
    console.error("usage: node tools/verify-export.mjs FILE");
    process.exit(2);
  }
  const count = await verifyExport(process.argv[2], (text) => console.error(text));
  console.log(JSON.stringify(count));
  process.exitCode = count.failed === 0 ? 0 : 1;
}
