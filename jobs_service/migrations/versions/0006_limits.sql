-- Limits on what an owner may have open: jobs that wait or run, and what they cost together.

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

-- What an owner has open: jobs that wait or run, submits and retries that were noted and may become such. Until the end of the transaction
-- nobody else is answered for the same owner, so that whoever goes on from the answer knows that it holds.
CREATE FUNCTION jobs.open_work(p_owner_id uuid, OUT open_jobs bigint, OUT open_cost bigint) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('genmesh.jobs.open_work'), hashtext(p_owner_id::text));
    -- One statement, begun after the lock was had: a note that becomes a job meanwhile is counted once.
    SELECT count(*), least(coalesce(sum(work.cost), 0), 9223372036854775807)
    INTO open_jobs, open_cost
    FROM (
        SELECT job.estimated_cost AS cost FROM jobs.jobs AS job WHERE job.owner_id = p_owner_id AND job.state < 3
        UNION ALL
        SELECT (convert_from(request.intent, 'UTF8')::jsonb ->> 'estimated_cost')::bigint
        FROM jobs.requests AS request
        WHERE request.owner_id = p_owner_id AND request.intent IS NOT NULL AND NOT request.abandoned
        UNION ALL
        SELECT failed.estimated_cost
        FROM jobs.retries AS retry
        JOIN jobs.jobs AS failed ON failed.job_id = retry.job_id
        WHERE failed.owner_id = p_owner_id AND failed.state = 4 AND NOT retry.abandoned
    ) AS work;
END
$$;

-- Notes submit requests that are about to become jobs, all of those that are new or none. Where a limit is given (0: none), they and all
-- that the owner has open have to be within it; open_jobs and open_cost say what it comes to. noted: those that were new; NULL: refused.
CREATE FUNCTION jobs.note_requests(
    p_owner_id uuid, p_request_ids uuid[], p_digests bytea[], p_job_ids uuid[], p_intents bytea[], p_costs bigint[],
    p_jobs_max bigint, p_cost_max bigint, OUT noted uuid[], OUT open_jobs bigint, OUT open_cost bigint
) LANGUAGE plpgsql AS $$
DECLARE
    fresh_jobs bigint;
    fresh_cost numeric;
BEGIN
    -- Losing these rows in a crash of PostgreSQL loses nothing but holds, which expire: no need to wait for the disk.
    PERFORM set_config('synchronous_commit', 'off', true);
    open_jobs := 0;
    open_cost := 0;
    IF p_jobs_max > 0 OR p_cost_max > 0 THEN
        SELECT work.open_jobs, work.open_cost INTO open_jobs, open_cost FROM jobs.open_work(p_owner_id) AS work;
        SELECT count(*), coalesce(sum(fresh.cost), 0) INTO fresh_jobs, fresh_cost
        FROM unnest(p_request_ids, p_costs) AS fresh (request_id, cost)
        WHERE NOT EXISTS (
            SELECT FROM jobs.requests AS known WHERE known.owner_id = p_owner_id AND known.request_id = fresh.request_id
        );
        open_jobs := open_jobs + fresh_jobs;
        open_cost := least(open_cost + fresh_cost, 9223372036854775807);
        -- A repeat of a request that was noted is within any limit.
        IF fresh_jobs > 0 AND ((p_jobs_max > 0 AND open_jobs > p_jobs_max) OR (p_cost_max > 0 AND open_cost > p_cost_max)) THEN
            RETURN;
        END IF;
    END IF;
    WITH inserted AS (
        INSERT INTO jobs.requests AS request (owner_id, request_id, digest, job_id, intent)
        SELECT p_owner_id, fresh.request_id, fresh.digest, fresh.job_id, fresh.intent
        FROM unnest(p_request_ids, p_digests, p_job_ids, p_intents) AS fresh (request_id, digest, job_id, intent)
        ON CONFLICT DO NOTHING
        RETURNING request.request_id
    )
    SELECT coalesce(array_agg(inserted.request_id), '{}') INTO noted FROM inserted;
END
$$;
