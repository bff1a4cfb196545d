#!/bin/sh
# Sets up OpenBao for the environment "prod", and gives each service of docker-compose.yml its certificate and, where it
# logs in to OpenBao, its role id and secret id. Run it again to renew the certificates (they live a day): the services
# take the new files with no restart.
set -eu
scripts=/opt/carnet/certs/scripts
out=/var/lib/carnet/identities
domain=prod.example
shop=spiffe://$domain/ns/shop/sa

python "$scripts/bootstrap_vault.py" setup --env prod --trust-domain "$domain" \
  --workload "spiffe://$domain/ns/carnet/sa/broker,serves" \
  --workload "$shop/payments,serves" \
  --workload "$shop/orders" \
  --workload "$shop/cron" \
  --workload "spiffe://$domain/ns/ops/sa/breakglass" \
  --credentials-dir "$out/credentials"

issue() {
  python "$scripts/bootstrap_vault.py" issue-certificate "$2" --out "$out/$1" --name tls
}
issue broker "spiffe://$domain/ns/carnet/sa/broker,serves"
issue broker-2 "spiffe://$domain/ns/carnet/sa/broker,serves"
issue admin "spiffe://$domain/ns/ops/sa/breakglass"
issue payments "$shop/payments,serves"
issue orders "$shop/orders"
issue cron "$shop/cron"

# Each service sees its own folder only.
mkdir -p "$out/ci"
for service in broker broker-2 ci; do
  role=${service%-2}
  for file in role-id secret-id; do
    install -m 0600 "$out/credentials/carnet-$role-prod-$file" "$out/$service/"
  done
  install -m 0644 "$out/openbao/ca.pem" "$out/$service/vault-ca.pem"
done
for service in broker broker-2; do
  install -m 0600 "$out/store/password" "$out/$service/store-password"
done
